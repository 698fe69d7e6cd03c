// Vectors of floats, and how those of a tap are picked from a channel.
#pragma once
#include "runtime.h"
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(LANES * 4), may_alias));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Vector8 __attribute__((vector_size(32), may_alias));
typedef float Vector4 __attribute__((vector_size(16), may_alias));

template <typename V = Vector> V load(const float *from) {
    return *reinterpret_cast<const V *>(from);
}
template <typename V> void store(float *to, V value) { *reinterpret_cast<V *>(to) = value; }
// Templates forget how a type is aligned, so that these are none.
inline Vector load_unaligned(const void *from) {
    return *static_cast<const Unaligned *>(from);
}
inline void store_unaligned(float *to, Vector value) {
    *reinterpret_cast<Unaligned *>(to) = value;
}
template <typename V = Vector> V broadcast(float value) { return value - V{}; }
#if defined(__AVX512F__)
// The first floats of a vector.
template <typename V> V low(__m512 vector) {
    if constexpr (sizeof(V) == 16)
        return (V)_mm512_castps512_ps128(vector);
    else if constexpr (sizeof(V) == 32)
        return (V)_mm512_castps512_ps256(vector);
    else
        return (V)vector;
}
#endif

// Of the first `count` lanes; others are zero, or left alone.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int count) { return __mmask16((1 << count) - 1); }
inline Vector load_some(const float *from, int count) {
    return (Vector)_mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline Vector gather(const float *from, const int32_t *indices, int count) {
    const __m512i at = _mm512_maskz_loadu_epi32(first_lanes(count), indices);
    return (Vector)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(count), at, from, 4);
}
inline void scatter(float *to, const int32_t *indices, int count, Vector value) {
    const __m512i at = _mm512_maskz_loadu_epi32(first_lanes(count), indices);
    _mm512_mask_i32scatter_ps(to, first_lanes(count), at, (__m512)value, 4);
}
#else
inline Vector load_some(const float *from, int count) {
    Vector values{};
    std::memcpy(&values, from, size_t(count) * 4);
    return values;
}
inline Vector gather(const float *from, const int32_t *indices, int count) {
    Vector values{};
    for (int lane = 0; lane < count; ++lane)
        values[lane] = from[indices[lane]];
    return values;
}
inline void scatter(float *to, const int32_t *indices, int count, Vector value) {
    for (int lane = 0; lane < count; ++lane)
        to[indices[lane]] = value[lane];
}
#endif

// Comparisons with NaN are false, so that it stays NaN as in PyTorch.
template <typename V> V clamp(V x, V low, V high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

struct Part {
    int64_t begin, end;
};
Part share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Picks what a tap reads for a vector V of positions out of many channels. `use` is called once, with
// a function of a channel and of what stands for padding, that knows where `indices` lie: side by
// side, within one, two or four vectors from `base` on, the least of them, or, if it is negative,
// anywhere.
template <typename V, typename Use>
void with_picker(const int32_t *indices, int32_t base, const Use &use) {
    constexpr int lanes = sizeof(V) / 4;
    decltype(V{} < V{}) is_there;
    std::memcpy(&is_there, indices, sizeof(V));
    is_there = is_there >= 0;
    const auto with = [&](const auto &read) {
        use([=](const float *from, V otherwise) { return is_there ? read(from) : otherwise; });
    };
#if defined(__AVX512F__)
    const __m512i at = _mm512_maskz_loadu_epi32(first_lanes(lanes), indices);
    const __mmask16 inside =
        _mm512_mask_cmpge_epi32_mask(first_lanes(lanes), at, _mm512_setzero_si512());
    const int first = inside ? __builtin_ctz(inside) : 0;
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i row = _mm512_add_epi32(_mm512_set1_epi32(base - first), count);
    const __m512i far = _mm512_sub_epi32(at, _mm512_set1_epi32(base));
    const auto beyond = [&](int most) {
        return _mm512_mask_cmpge_epi32_mask(inside, far, _mm512_set1_epi32(most));
    };
    const auto two = [=](const float *from) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(from), far, _mm512_loadu_ps(from + LANES));
    };
    if (!inside || (base >= 0 && !_mm512_mask_cmpneq_epi32_mask(inside, at, row)))
        with([=](const float *from) {
            return low<V>(_mm512_maskz_loadu_ps(inside, from + base - first));
        });
    else if (base < 0)
        with([=](const float *from) {
            return low<V>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, at, from, 4));
        });
    else if (!beyond(LANES))
        with([=](const float *from) {
            return low<V>(_mm512_permutexvar_ps(far, _mm512_loadu_ps(from + base)));
        });
    else if (!beyond(2 * LANES))
        with([=](const float *from) { return low<V>(two(from + base)); });
    else
        with([=, upper = beyond(2 * LANES)](const float *from) {
            const float *near = from + base;
            return low<V>(_mm512_mask_mov_ps(two(near), upper, two(near + 2 * LANES)));
        });
#else
    (void)base;
    with([=](const float *from) {
        V values{};
        for (int lane = 0; lane < lanes; ++lane)
            if (indices[lane] >= 0)
                values[lane] = from[indices[lane]];
        return values;
    });
#endif
}

} // namespace
