// What is computed float by float. Values begin and end with whole vectors.
#pragma once
#include "vectors.h"
#include <algorithm>

namespace {

typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

// e^x within 2e-7, relative: 2^n times a polynomial of what is left, at most ln(2) / 2.
Vector exponential(Vector x) {
    x = clamp(x, broadcast(-87.0f), broadcast(89.0f)); // e^89 is infinite, as it is from 88.73 on
    const Vector magic = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds
    const Vector n = (x * 1.44269504f + magic) - magic;
    const Vector rest = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln(2) in two parts
    Vector sum = broadcast(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = sum * rest + factor;
    const Vector known = n == n ? n : Vector{};
    const Integers power = (__builtin_convertvector(known, Integers) + 127) << 23;
    return sum * (Vector)power;
}

template <int64_t F> Vector apply(Vector x) {
    const Vector gate = F == SIGMOID || F == SILU
                            ? 1.0f / (1.0f + exponential(-x))
                            : clamp(x + 3.0f, Vector{}, broadcast(6.0f)) * (1.0f / 6);
    return F == SILU || F == HARDSWISH ? x * gate : gate;
}

template <int64_t F> void activate(const Step &s, float *arena, Part vectors) {
    const float *in = arena + s.in;
    float *out = arena + s.out;
    for (int64_t i = vectors.begin * LANES; i < vectors.end * LANES; i += LANES)
        store(out + i, apply<F>(load(in + i)));
}

Part own_vectors(const Step &s, int thread, int threads) {
    return share((s.channels * s.out_stride + LANES - 1) / LANES, thread, threads);
}

void activate(const Step &s, float *arena, int thread, int threads) {
    const Part vectors = own_vectors(s, thread, threads);
    switch (s.function) {
    case SIGMOID:
        return activate<SIGMOID>(s, arena, vectors);
    case HARDSIGMOID:
        return activate<HARDSIGMOID>(s, arena, vectors);
    case SILU:
        return activate<SILU>(s, arena, vectors);
    case HARDSWISH:
        return activate<HARDSWISH>(s, arena, vectors);
    }
}

// Parts of a concatenation may begin and end anywhere, and what lies behind is not theirs.
void add(const Step &s, float *arena, int thread, int threads) {
    const float *in = arena + s.in, *extra = s.extra < 0 ? nullptr : arena + s.extra;
    float *out = arena + s.out;
    const Vector low = broadcast(s.low), high = broadcast(s.high);
    const int64_t count = s.channels * s.out_stride;
    const Part vectors = own_vectors(s, thread, threads);
    const int64_t end = std::min(vectors.end * LANES, count);
    int64_t i = vectors.begin * LANES;
    for (; i + LANES <= end; i += LANES) {
        Vector value = load_unaligned(in + i);
        if (extra)
            value += load_unaligned(extra + i);
        store_unaligned(out + i, clamp(value, low, high));
    }
    for (; i < end; ++i) {
        const float value = extra ? in[i] + extra[i] : in[i];
        const float raised = value < s.low ? s.low : value;
        out[i] = raised > s.high ? s.high : raised;
    }
}

// Each channel times its own factor, or times as many as it has pixels.
void multiply(const Step &s, float *arena, Part channels) {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
        const float *in = arena + s.in + c * s.out_stride;
        const float *factor = arena + s.extra + c * (s.extra_stride ? s.extra_stride : s.out_stride);
        float *out = arena + s.out + c * s.out_stride;
        if (!s.extra_stride)
            for (int64_t i = 0; i < s.out_stride; ++i)
                out[i] = in[i] * factor[i];
        else if (s.lanes)
            for (int64_t i = 0; i < s.out_stride; i += LANES)
                store(out + i, load(in + i) * load(factor));
        else
            for (int64_t sample = 0; sample < s.samples; ++sample)
                for (int64_t i = sample * s.pixels; i < (sample + 1) * s.pixels; ++i)
                    out[i] = in[i] * factor[sample];
    }
}

} // namespace
