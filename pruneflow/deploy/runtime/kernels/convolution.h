// Convolutions: kernels for tiles of the output, and the panels that they read.
#pragma once
#include "vectors.h"
#include <algorithm>

namespace {

constexpr int MAX_SUMS = REGISTERS == 32 ? 24 : 12; // registers left to inputs and the weight

// The sums of one group of G output channels at R x Q vectors stay in registers over all surviving
// weights of the group that fall into the present range of the input. Columns are S vectors apart
// in the input, so that one pointer serves a row.
template <typename V, int G, int R, int Q, int S>
void tile(const Step &s, const Tile &t, const float *in, float *arena, int64_t block, Part groups) {
    // Independent chains of sums where a tile has too few to hide the latency of a multiply-add.
    constexpr int U = G * R * Q >= 8 ? 1 : G * R * Q >= 4 ? 2 : 4;
    constexpr int64_t lanes = sizeof(V) / 4;
    const int64_t unit = s.unit ? s.unit : R * Q * lanes;
    float *out = arena + s.out;
    const float *extra = s.extra < 0 ? nullptr : arena + s.extra;
    const float *x[R];
    for (int r = 0; r < R; ++r)
        x[r] = in + t.in[r];
    const V low = broadcast<V>(s.low), high = broadcast<V>(s.high);
    const int32_t *pointer = s.pointer + (t.list * s.blocks + block) * (s.groups + 1);
    const bool first = block == 0, last = block == s.blocks - 1;
    for (int64_t o = groups.begin; o < groups.end; ++o) {
        const int32_t *e = s.entries + int64_t(pointer[o]) * (1 + G);
        const int32_t *const stop = s.entries + int64_t(pointer[o + 1]) * (1 + G);
        if (e == stop && !first && !last)
            continue;
        const int64_t channel = s.order[o] * G;
        const int present = int(std::min<int64_t>(G, s.channels - channel));
        V sum[U][G][R][Q] = {};
        for (int g = 0; g < G; ++g)
            for (int r = 0; r < R; ++r) {
                const float *from = out + (channel + g) * s.out_stride + t.out[r];
                for (int q = 0; q < Q; ++q)
                    if (first)
                        sum[0][g][r][q] = broadcast<V>(s.bias[channel + g]);
                    else if (g < present)
                        sum[0][g][r][q] = load<V>(from + q * lanes);
            }
        const auto add = [&](const int32_t *entry, int u) __attribute__((always_inline)) {
            const int64_t at = entry[0] * unit;
            V weight[G];
            for (int g = 0; g < G; ++g) {
                float value;
                std::memcpy(&value, entry + 1 + g, 4);
                weight[g] = broadcast<V>(value);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int q = 0; q < Q; ++q) {
                    const V value = load<V>(x[r] + at + q * S * lanes);
#pragma GCC unroll 4
                    for (int g = 0; g < G; ++g)
                        sum[u][g][r][q] += weight[g] * value;
                }
        };
        for (; stop - e >= U * (1 + G); e += U * (1 + G))
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u)
                add(e + u * (1 + G), u);
        if (U > 1)
            for (; e < stop; e += 1 + G)
                add(e, 0);
        for (int g = 0; g < G; ++g)
            if (g < present)
                for (int r = 0; r < R; ++r) {
                    const int64_t at = (channel + g) * s.out_stride + t.out[r];
                    for (int q = 0; q < Q; ++q) {
                        V value = sum[0][g][r][q];
                        for (int u = 1; u < U; ++u)
                            value += sum[u][g][r][q];
                        if (last) {
                            if (extra)
                                value += load<V>(extra + at + q * lanes);
                            value = clamp(value, low, high);
                        }
                        store(out + at + q * lanes, value);
                    }
                }
    }
}

// Of few positions, a vector holds output channels: a group is as many as it has lanes, and an
// entry a weight for each of them. P of the positions of one vector of the input are there at all.
template <int P>
void outputs(const Step &s, const Tile &t, const float *in, float *arena, int64_t, Part groups) {
    constexpr int U = P <= 2 ? 4 : P == 4 ? 2 : 1;
    constexpr int size = 1 + LANES;
    const int64_t unit = s.unit ? s.unit : t.columns * s.panel_lanes;
    float *out = arena + s.out;
    const float *extra = s.extra < 0 ? nullptr : arena + s.extra;
    for (int64_t o = groups.begin; o < groups.end; ++o) {
        const int32_t *e = s.entries + int64_t(s.pointer[o]) * size;
        const int32_t *const stop = s.entries + int64_t(s.pointer[o + 1]) * size;
        Vector sum[U][P] = {};
        const auto add = [&](const int32_t *entry, int u) __attribute__((always_inline)) {
            const float *x = in + t.in[0] + entry[0] * unit;
            const Vector weight = load_unaligned(entry + 1);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p)
                sum[u][p] += weight * x[p];
        };
        for (; stop - e >= U * size; e += U * size)
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u)
                add(e + u * size, u);
        for (; e < stop; e += size)
            add(e, 0);
        const int64_t channel = s.order[o] * LANES;
        const int present = int(std::min<int64_t>(LANES, s.channels - channel));
        for (int p = 0; p < P; ++p) {
            Vector value = load_unaligned(s.bias + channel);
            for (int u = 0; u < U; ++u)
                value += sum[u][p];
            int64_t at = channel * s.out_stride + t.out[0] + p;
            for (int lane = 0; lane < present; ++lane, at += s.out_stride) {
                float one = value[lane] + (extra ? extra[at] : 0);
                one = one < s.low ? s.low : one;
                out[at] = one > s.high ? s.high : one;
            }
        }
    }
}

using TileKernel = void (*)(const Step &, const Tile &, const float *, float *, int64_t, Part);

// The sizes that lowering.py cuts tiles into.
template <int G, int R, int Q, int S> constexpr TileKernel kernel() {
    if constexpr (G * R * Q <= MAX_SUMS)
        return tile<Vector, G, R, Q, S>;
    else
        return nullptr;
}
template <int G, int Q, int S> TileKernel kernel(int rows) {
    switch (rows) {
    case 1: return kernel<G, 1, Q, S>();
    case 2: return kernel<G, 2, Q, S>();
    case 3: return kernel<G, 3, Q, S>();
    case 4: return kernel<G, 4, Q, S>();
    case 6: return kernel<G, 6, Q, S>();
    default: return kernel<G, 8, Q, S>();
    }
}
template <int G, int S> TileKernel kernel(int rows, int columns) {
    switch (columns) {
    case 2: return kernel<G, 2, S>(rows);
    case 3: return kernel<G, 3, S>(rows);
    case 4: return kernel<G, 4, S>(rows);
    case 6: return kernel<G, 6, S>(rows);
    default: return kernel<G, 8, S>(rows);
    }
}
template <int G> TileKernel kernel(int rows, int columns, int64_t step) {
    if (columns == 1)
        return kernel<G, 1, 1>(rows);
    return step == 2 ? kernel<G, 2>(rows, columns) : kernel<G, 1>(rows, columns);
}
// A whole activation in a vector of fewer lanes.
template <typename V> TileKernel narrow(int64_t group) {
    return group == 4   ? tile<V, 4, 1, 1, 1>
           : group == 2 ? tile<V, 2, 1, 1, 1>
                        : tile<V, 1, 1, 1, 1>;
}
TileKernel kernel(const Step &s, const Tile &t) {
    if (s.positions)
        return s.positions == 1   ? outputs<1>
               : s.positions == 2 ? outputs<2>
               : s.positions <= 4 ? outputs<4>
                                  : outputs<8>;
    if (s.panel_lanes < LANES)
        return s.panel_lanes == 4 ? narrow<Vector4>(s.group) : narrow<Vector8>(s.group);
    return s.group == 4   ? kernel<4>(t.rows, t.columns, s.column_step)
           : s.group == 2 ? kernel<2>(t.rows, t.columns, s.column_step)
                          : kernel<1>(t.rows, t.columns, s.column_step);
}

void fill_padded(const Step &s, const float *in, float *panel) {
    for (int64_t row = 0; row < s.rows; ++row) {
        const float *from = in + row * s.in_stride;
        float *to = panel + row * s.panel_pixels * LANES;
        for (int64_t pixel = 0; pixel < s.panel_pixels; ++pixel, to += LANES) {
            const int32_t at = s.table[pixel];
            store(to, at < 0 ? Vector{} : load(from + at * LANES));
        }
    }
}

// Rows are sorted by tap, so that what is to be picked is looked up once for many channels.
template <typename V>
void fill_panel(const Step &s, const Tile &t, const float *in, float *panel, Part rows) {
    constexpr int64_t lanes = sizeof(V) / 4;
    const int64_t size = t.columns * lanes;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
        const int64_t begin = std::max<int64_t>(rows.begin, s.tap_row[tap]);
        const int64_t end = std::min<int64_t>(rows.end, s.tap_row[tap + 1]);
        if (begin >= end)
            continue;
        const int32_t *source = s.row_source;
        for (int i = 0; i < t.columns; ++i) {
            const int64_t position = tap * s.out_stride + t.out[0] + i * lanes;
            float *to = panel + (begin - rows.begin) * size + i * lanes;
            with_picker<V>(s.table + position, s.base[position / lanes], [=](const auto &pick) {
                float *at = to;
                for (int64_t row = begin; row < end; ++row, at += size)
                    store(at, pick(in + source[row], V{}));
            });
        }
    }
}

void fill_panel(const Step &s, const Tile &t, const float *in, float *panel, Part rows) {
    if (s.panel_lanes == 4)
        fill_panel<Vector4>(s, t, in, panel, rows);
    else if (s.panel_lanes == 8)
        fill_panel<Vector8>(s, t, in, panel, rows);
    else
        fill_panel<Vector>(s, t, in, panel, rows);
}

// What a tile reads of the present range of the input is copied into a panel where it does not lie
// as the kernels need it. Each thread has its own, as it is to stay in the cache beside the core.
void convolution(const Step &s, float *arena, float *panel, int thread, int threads) {
    const bool by_tile = s.by_tile && threads > 1;
    const Part tiles = by_tile ? share(s.tiles, thread, threads) : Part{0, s.tiles};
    Part groups{0, s.groups};
    if (!by_tile && threads > 1)
        groups = {s.split[thread], s.split[thread + 1]};
    const float *in = arena + s.in;
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
        const Tile &t = s.tile[i];
        if (s.rows && s.lanes && (i == tiles.begin || i % s.tiles_per_panel == 0)) {
            fill_padded(s, arena + s.in + i / s.tiles_per_panel * s.rows * s.in_stride, panel);
            in = panel;
        }
        for (int64_t block = 0; block < s.blocks; ++block) {
            if (s.rows && !s.lanes) {
                const Part rows{s.cut[block], s.cut[block + 1]};
                fill_panel(s, t, arena + s.in, panel, rows);
                in = panel - rows.begin * t.columns * s.panel_lanes;
            }
            kernel(s, t)(s, t, in, arena, block, groups);
        }
    }
}

} // namespace
