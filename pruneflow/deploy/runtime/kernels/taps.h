// What goes over the taps of each channel alone: pooling and depthwise convolutions.
#pragma once
#include "vectors.h"
#include <algorithm>
#include <limits>

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <bool Mean, typename V> V pool_add(V sum, V value) {
    if (Mean)
        return sum + value;
    return (value > sum) | (value != value) ? value : sum;
}

template <bool Mean> void pool_lanes(const Step &s, float *arena, Part channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        const float *from = arena + s.in + c * s.in_stride;
        float *to = arena + s.out + c * s.out_stride;
        for (int64_t pixel = 0; pixel < s.pixels; ++pixel) {
            Vector sum = broadcast(Mean ? 0 : -INFINITE);
            for (int64_t tap = 0; tap < s.taps; ++tap) {
                const int32_t at = s.table[tap * s.pixels + pixel];
                if (at >= 0)
                    sum = pool_add<Mean>(sum, load(from + at * LANES));
            }
            store(to + pixel * LANES, Mean ? sum * s.scale[pixel] : sum);
        }
    }
}

// In the layout `pixels`: calls use(channel, tap, what the tap reads, where the result goes) for each
// vector of positions, tap by tap, of as many channels in turn as stay in the cache meanwhile.
template <typename V, typename Use>
void for_each_tap(const Step &s, float *arena, Part channels, V otherwise, const Use &use) {
    constexpr int64_t lanes = sizeof(V) / 4;
    const int64_t in_stride = s.in_stride, out_stride = s.out_stride;
    const int64_t most = std::max<int64_t>(16, 4096 / in_stride);
    for (int64_t begin = channels.begin; begin < channels.end; begin += most) {
        const int64_t end = std::min(begin + most, channels.end);
        for (int64_t at = 0; at < out_stride; at += lanes)
            for (int64_t tap = 0; tap < s.taps; ++tap) {
                const int64_t position = tap * out_stride + at;
                with_picker<V>(s.table + position, s.base[position / lanes], [&](auto pick) {
                    const float *from = arena + s.in + begin * in_stride;
                    float *to = arena + s.out + begin * out_stride + at;
                    for (int64_t c = begin; c < end; ++c, from += in_stride, to += out_stride)
                        use(c, tap, pick(from, otherwise), to);
                });
            }
    }
}

template <bool Mean, typename V> void pool_pixels(const Step &s, float *arena, Part channels) {
    const auto take = [](int64_t, int64_t tap, V value, float *to) {
        store(to, tap == 0 ? value : pool_add<Mean>(load<V>(to), value));
    };
    for_each_tap<V>(s, arena, channels, broadcast<V>(Mean ? 0 : -INFINITE), take);
    if (Mean)
        for (int64_t c = channels.begin; c < channels.end; ++c) {
            float *to = arena + s.out + c * s.out_stride;
            for (int64_t i = 0; i < s.out_stride; ++i)
                to[i] *= s.scale[i];
        }
}

// The mean of all pixels of a sample, which lie side by side.
void pool_whole(const Step &s, float *arena, Part channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c)
        for (int64_t sample = 0; sample < s.samples; ++sample) {
            const float *from = arena + s.in + c * s.in_stride + sample * s.taps;
            Vector sums[4] = {};
            int64_t i = 0;
            for (; i + 4 * LANES <= s.taps; i += 4 * LANES)
                for (int k = 0; k < 4; ++k)
                    sums[k] += load_unaligned(from + i + k * LANES);
            const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            float sum = 0;
            for (int lane = 0; lane < LANES; ++lane)
                sum += all[lane];
            for (; i < s.taps; ++i)
                sum += from[i];
            arena[s.out + c * s.out_stride + sample] = sum * s.scale[sample];
        }
}

template <bool Mean> void pool(const Step &s, float *arena, Part channels) {
    if (s.lanes)
        pool_lanes<Mean>(s, arena, channels);
    else if (s.whole)
        pool_whole(s, arena, channels);
    else if (s.out_stride >= LANES)
        pool_pixels<Mean, Vector>(s, arena, channels);
    else if (s.out_stride == 8)
        pool_pixels<Mean, Vector8>(s, arena, channels);
    else
        pool_pixels<Mean, Vector4>(s, arena, channels);
}

template <typename V> void depthwise(const Step &s, float *arena, Part channels) {
    const int64_t count = s.channels, last = s.taps - 1;
    const float *weight = reinterpret_cast<const float *>(s.entries), *bias = s.bias;
    const V low = broadcast<V>(s.low), high = broadcast<V>(s.high);
    const int64_t extra = s.extra < 0 ? 0 : s.extra - s.out; // from the result on
    for_each_tap<V>(s, arena, channels, V{}, [=](int64_t c, int64_t tap, V value, float *to) {
        const V before = tap == 0 ? broadcast<V>(bias[c]) : load<V>(to);
        V sum = before + broadcast<V>(weight[tap * count + c]) * value;
        if (tap == last)
            sum = clamp(extra ? sum + load<V>(to + extra) : sum, low, high);
        store(to, sum);
    });
}

void depthwise(const Step &s, float *arena, Part channels) {
    if (s.out_stride >= LANES)
        depthwise<Vector>(s, arena, channels);
    else if (s.out_stride == 8)
        depthwise<Vector8>(s, arena, channels);
    else
        depthwise<Vector4>(s, arena, channels);
}

} // namespace
