// Runs a plan made by pruneflow/deploy/runtime/lowering.py; see runtime.h for layouts and terms.
#include "runtime.h"
#include "threads.h"
#include <algorithm>
#include <cstring>
#include <limits>

namespace {

typedef float Vector __attribute__((vector_size(LANES * 4), may_alias));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t UnalignedIntegers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

Vector load(const float *from) { return *reinterpret_cast<const Vector *>(from); }
void store(float *to, Vector value) { *reinterpret_cast<Vector *>(to) = value; }
Vector broadcast(float value) { return value - Vector{}; }

// Comparisons with NaN are false, so that it stays NaN as in PyTorch.
Vector clamp(Vector x, Vector low, Vector high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

struct Part {
    int64_t begin, end;
};
Part share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// ---- convolution ---------------------------------------------------------------------------

constexpr int MOST_SUMS = REGISTERS == 32 ? 24 : 12; // registers left to inputs and the weight

// The sums of one group of G output channels at R x Q vectors stay in registers over all surviving
// weights of the group that fall into the present range of the input. Columns are S vectors apart
// in the input, so that one pointer serves a row.
template <int G, int R, int Q, int S>
void tile(const Step &s, const Tile &t, const float *in, int64_t unit, float *out,
          const float *extra, int64_t begin, int64_t end) {
    // Independent chains of sums where a tile has too few to hide the latency of a multiply-add.
    constexpr int U = G * R * Q >= 8 ? 1 : G * R * Q >= 4 ? 2 : 4;
    const float *x[R];
    for (int r = 0; r < R; ++r)
        x[r] = in + t.in[r];
    const Vector low = broadcast(s.low), high = broadcast(s.high);
    const int32_t *pointer = s.pointer + t.list * s.blocks * (s.groups + 1);
    for (int64_t block = 0; block < s.blocks; ++block, pointer += s.groups + 1) {
        const bool first = block == 0, last = block == s.blocks - 1;
        for (int64_t o = begin; o < end; ++o) {
            const int32_t *e = s.entries + int64_t(pointer[o]) * (1 + G);
            const int32_t *const stop = s.entries + int64_t(pointer[o + 1]) * (1 + G);
            if (e == stop && !first && !last)
                continue;
            const int present = int(std::min<int64_t>(G, s.channels - o * G));
            Vector sum[U][G][R][Q] = {};
            for (int g = 0; g < G; ++g)
                for (int r = 0; r < R; ++r) {
                    const float *from = out + (o * G + g) * s.out_stride + t.out[r];
                    for (int q = 0; q < Q; ++q)
                        if (first)
                            sum[0][g][r][q] = broadcast(s.bias[o * G + g]);
                        else if (g < present)
                            sum[0][g][r][q] = load(from + q * LANES);
                }
            const auto add = [&](const int32_t *entry, int u) __attribute__((always_inline)) {
                const int64_t at = entry[0] * unit;
                Vector weight[G];
                for (int g = 0; g < G; ++g) {
                    float value;
                    std::memcpy(&value, entry + 1 + g, 4);
                    weight[g] = broadcast(value);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int q = 0; q < Q; ++q) {
                        const Vector value = load(x[r] + at + q * S * LANES);
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
                        const int64_t at = (o * G + g) * s.out_stride + t.out[r];
                        for (int q = 0; q < Q; ++q) {
                            Vector value = sum[0][g][r][q];
                            for (int u = 1; u < U; ++u)
                                value += sum[u][g][r][q];
                            if (last) {
                                if (extra)
                                    value += load(extra + at + q * LANES);
                                value = clamp(value, low, high);
                            }
                            store(out + at + q * LANES, value);
                        }
                    }
        }
    }
}

// Of few positions, a vector holds output channels: a group is as many as it has lanes, and an entry
// a weight for each of them. P of the positions of one vector of the input are there at all.
template <int P>
void outputs(const Step &s, const Tile &t, const float *in, int64_t unit, float *out,
             const float *extra, int64_t begin, int64_t end) {
    constexpr int U = P <= 2 ? 4 : P == 4 ? 2 : 1;
    constexpr int size = 1 + LANES;
    for (int64_t o = begin; o < end; ++o) {
        const int32_t *e = s.entries + int64_t(s.pointer[o]) * size;
        const int32_t *const stop = s.entries + int64_t(s.pointer[o + 1]) * size;
        Vector sum[U][P] = {};
        const auto add = [&](const int32_t *entry, int u) __attribute__((always_inline)) {
            const float *x = in + t.in[0] + entry[0] * unit;
            const Vector weight = *reinterpret_cast<const Unaligned *>(entry + 1);
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
        const int present = int(std::min<int64_t>(LANES, s.channels - o * LANES));
        for (int p = 0; p < P; ++p) {
            Vector value = *reinterpret_cast<const Unaligned *>(s.bias + o * LANES);
            for (int u = 0; u < U; ++u)
                value += sum[u][p];
            int64_t at = o * LANES * s.out_stride + t.out[0] + p;
            for (int lane = 0; lane < present; ++lane, at += s.out_stride) {
                float one = value[lane] + (extra ? extra[at] : 0);
                one = one < s.low ? s.low : one;
                out[at] = one > s.high ? s.high : one;
            }
        }
    }
}

using TileKernel = void (*)(const Step &, const Tile &, const float *, int64_t, float *,
                            const float *, int64_t, int64_t);

// The sizes that lowering.py cuts tiles into.
template <int G, int R, int Q, int S> constexpr TileKernel kernel() {
    if constexpr (G * R * Q <= MOST_SUMS)
        return tile<G, R, Q, S>;
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
TileKernel kernel(const Step &s, const Tile &t) {
    if (s.positions)
        return s.positions == 1   ? outputs<1>
               : s.positions == 2 ? outputs<2>
               : s.positions <= 4 ? outputs<4>
                                  : outputs<8>;
    return s.group == 4   ? kernel<4>(t.rows, t.columns, s.column_step)
           : s.group == 2 ? kernel<2>(t.rows, t.columns, s.column_step)
                          : kernel<1>(t.rows, t.columns, s.column_step);
}

Vector gather(const float *from, const int32_t *indices, float otherwise) {
#if defined(__AVX512F__)
    const __m512i at = _mm512_loadu_si512(indices);
    const __mmask16 inside = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
    return (Vector)_mm512_mask_i32gather_ps(_mm512_set1_ps(otherwise), inside, at, from, 4);
#else
    Vector values;
    for (int lane = 0; lane < LANES; ++lane)
        values[lane] = indices[lane] >= 0 ? from[indices[lane]] : otherwise;
    return values;
#endif
}

void fill_padded(const Step &s, const float *in, float *panel, Part rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float *from = in + row * s.in_stride;
        float *to = panel + row * s.panel_pixels * LANES;
        for (int64_t pixel = 0; pixel < s.panel_pixels; ++pixel, to += LANES) {
            const int32_t at = s.table[pixel];
            store(to, at < 0 ? Vector{} : load(from + at * LANES));
        }
    }
}

// What lies outside is cut off by its bits: it may be anything, NaN too.
void fill_panel(const Step &s, const Tile &t, const float *in, float *panel, Part rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float *from = in + s.row_source[row];
        const int32_t tap = s.row_tap[row], *table = s.table + tap * s.out_stride;
        float *to = panel + row * t.rows * t.columns * LANES;
        for (int i = 0; i < t.rows * t.columns; ++i, to += LANES) {
            const int32_t position = t.out[i / t.columns] + i % t.columns * LANES;
            if (s.shift) {
                const Integers inside =
                    *reinterpret_cast<const UnalignedIntegers *>(table + position) >= 0;
                const Integers bits = *reinterpret_cast<const UnalignedIntegers *>(
                    from + position + s.shift[tap]);
                store(to, (Vector)(bits & inside));
            } else {
                store(to, gather(from, table + position, 0));
            }
        }
    }
}

void convolution(const Step &s, float *arena, Barrier &team, int thread) {
    const float *in = arena + s.in;
    const float *extra = s.extra < 0 ? nullptr : arena + s.extra;
    const bool by_tile = s.by_tile && team.threads > 1;
    const Part tiles = by_tile ? share(s.tiles, thread, team.threads) : Part{0, s.tiles};
    Part groups{0, s.groups};
    if (!by_tile && team.threads > 1)
        groups = {s.split[thread], s.split[thread + 1]};
    const float *from = in;
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
        const Tile &t = s.tile[i];
        int64_t unit = s.unit;
        if (s.rows && i % s.tiles_per_panel == 0) {
            // Two panels in turns: one is filled while a slower thread still reads the other.
            const int64_t turn = i / s.tiles_per_panel;
            float *panel = arena + s.panel + (by_tile ? thread : turn % 2) * s.panel_size;
            const Part rows = by_tile ? Part{0, s.rows} : share(s.rows, thread, team.threads);
            if (s.lanes)
                fill_padded(s, in + turn * s.rows * s.in_stride, panel, rows);
            else
                fill_panel(s, t, in, panel, rows);
            if (!by_tile)
                team.wait();
            from = panel;
        }
        if (unit == 0)
            unit = t.rows * t.columns * LANES;
        kernel(s, t)(s, t, from, unit, arena + s.out, extra, groups.begin, groups.end);
    }
}

// ---- everything else -----------------------------------------------------------------------

template <bool Mean> Vector pool_add(Vector sum, Vector value) {
    if (Mean)
        return sum + value;
    return (value > sum) | (value != value) ? value : sum;
}

template <bool Mean> void pool(const Step &s, float *arena, Part channels) {
    const float empty = Mean ? 0 : -std::numeric_limits<float>::infinity();
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        const float *from = arena + s.in + c * s.in_stride;
        float *to = arena + s.out + c * s.out_stride;
        if (s.lanes) {
            for (int64_t pixel = 0; pixel < s.pixels; ++pixel) {
                Vector sum = broadcast(empty);
                for (int64_t tap = 0; tap < s.taps; ++tap) {
                    const int32_t at = s.table[tap * s.pixels + pixel];
                    if (at >= 0)
                        sum = pool_add<Mean>(sum, load(from + at * LANES));
                }
                store(to + pixel * LANES, Mean ? sum * s.scale[pixel] : sum);
            }
        } else {
            for (int64_t at = 0; at < s.out_stride; at += LANES) {
                Vector sum = broadcast(empty);
                for (int64_t tap = 0; tap < s.taps; ++tap)
                    sum = pool_add<Mean>(sum,
                                         gather(from, s.table + tap * s.out_stride + at, empty));
                store(to + at, Mean ? sum * load(s.scale + at) : sum);
            }
        }
    }
}

void add(const Step &s, float *arena, Part channels) {
    const Vector low = broadcast(s.low), high = broadcast(s.high);
    for (int64_t i = channels.begin * s.out_stride; i < channels.end * s.out_stride; i += LANES) {
        Vector value = load(arena + s.in + i);
        if (s.extra >= 0)
            value += load(arena + s.extra + i);
        store(arena + s.out + i, clamp(value, low, high));
    }
}

void flatten(const Step &s, float *arena, Part channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        const float *from = arena + s.in + c * s.in_stride;
        float *to = arena + s.out + c * s.pixels * s.out_stride;
        for (int64_t sample = 0; sample < s.samples; ++sample)
            for (int64_t pixel = 0; pixel < s.pixels; ++pixel)
                to[pixel * s.out_stride + sample] = from[sample * s.pixels + pixel];
    }
}

// Lanes of samples that the batch does not have are zero.
void load_batch(const Step &s, const float *batch, int64_t valid, float *arena, Part channels) {
    const int64_t features = s.channels * s.pixels;
    float *to = arena + s.out;
    if (s.lanes) {
        const int64_t begin = channels.begin * s.pixels, end = channels.end * s.pixels;
        for (int64_t first = 0; first < s.samples; first += LANES, to += features * LANES)
            for (int64_t low = begin; low < end; low += LANES) // as many as share a cache line
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const bool present = first + lane < valid;
                    const float *from = batch + (first + lane) * features;
                    for (int64_t i = low; i < std::min<int64_t>(low + LANES, end); ++i)
                        to[i * LANES + lane] = present ? from[i] : 0;
                }
        return;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        float *row = to + c * s.out_stride;
        for (int64_t sample = 0; sample < valid; ++sample)
            std::copy_n(batch + sample * features + c * s.pixels, s.pixels,
                        row + sample * s.pixels);
        std::fill(row + valid * s.pixels, row + s.out_stride, 0.0f);
    }
}

void store_batch(const Step &s, const float *arena, float *batch, int64_t valid, Part channels) {
    const int64_t features = s.channels * s.pixels;
    for (int64_t sample = 0; sample < valid; ++sample)
        for (int64_t c = channels.begin; c < channels.end; ++c)
            for (int64_t pixel = 0; pixel < s.pixels; ++pixel) {
                const int64_t feature = c * s.pixels + pixel;
                const int64_t at = s.lanes ? (sample / LANES * features + feature) * LANES +
                                                 sample % LANES
                                           : c * s.in_stride + sample * s.pixels + pixel;
                batch[sample * features + feature] = arena[s.in + at];
            }
}

struct Call {
    const Step *steps;
    int64_t step_count;
    const float *in;
    float *out;
    int64_t count;
    float *arena;
    int64_t arena_size;
    int threads;
    bool together;
    Barrier &team;
};

void run_steps(const Call &call, float *arena, int64_t piece, Barrier &team, int thread) {
    for (int64_t i = 0; i < call.step_count; ++i) {
        const Step &s = call.steps[i];
        const int64_t first = piece * s.samples, valid = std::min(s.samples, call.count - first);
        const int64_t features = s.channels * s.pixels;
        const Part channels = share(s.channels, thread, team.threads);
        switch (s.kind) {
        case LOAD:
            load_batch(s, call.in + first * features, valid, arena, channels);
            break;
        case STORE:
            store_batch(s, arena, call.out + first * features, valid, channels);
            break;
        case CONVOLUTION:
            convolution(s, arena, team, thread);
            break;
        case POOL:
            s.scale ? pool<true>(s, arena, channels) : pool<false>(s, arena, channels);
            break;
        case ADD:
            add(s, arena, channels);
            break;
        case FLATTEN:
            flatten(s, arena, channels);
            break;
        }
        team.wait();
    }
}

void work(void *context, int thread) {
    const Call &call = *static_cast<const Call *>(context);
    const int64_t samples = call.steps[0].samples;
    const int64_t pieces = (call.count + samples - 1) / samples;
    if (call.together) {
        for (int64_t piece = 0; piece < pieces; ++piece)
            run_steps(call, call.arena, piece, call.team, thread);
    } else {
        Barrier alone(1);
        const Part own = share(pieces, thread, call.threads);
        for (int64_t piece = own.begin; piece < own.end; ++piece)
            run_steps(call, call.arena + thread * call.arena_size, piece, alone, 0);
    }
}

} // namespace

extern "C" {

int pruneflow_lanes() { return LANES; }
int pruneflow_registers() { return REGISTERS; }
int64_t pruneflow_step_bytes() { return sizeof(Step); }

void pruneflow_run(const Step *steps, int64_t step_count, const float *in, float *out,
                   int64_t count, float *arena, int64_t arena_size, int threads, int together) {
    Barrier team(threads);
    Call call{steps, step_count, in, out, count, arena, arena_size, threads, together != 0, team};
    Pool::instance().run(threads, work, &call);
}
}
