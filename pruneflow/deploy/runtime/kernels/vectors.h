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
template <typename V = Vector> V broadcast(float value) { return value - V{}; }

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

// Picks what a tap reads for a vector of positions, 4, 8 or LANES of them, out of a channel.
class Picker {
  public:
    // `base`: the least of the indices, or negative where they do not lie within four vectors.
    Picker(const int32_t *indices, int32_t base, int64_t lanes)
#if defined(__AVX512F__)
        : base(base) {
        present = __mmask16((1 << lanes) - 1);
        at = _mm512_maskz_loadu_epi32(present, indices);
        inside = _mm512_mask_cmpge_epi32_mask(present, at, _mm512_setzero_si512());
        if (base < 0) {
            way = inside ? GATHER : SIDE_BY_SIDE;
            return;
        }
        const int first = __builtin_ctz(inside);
        const __m512i row = _mm512_add_epi32(_mm512_set1_epi32(base - first), COUNT);
        if (_mm512_mask_cmpneq_epi32_mask(inside, at, row) == 0) {
            way = SIDE_BY_SIDE;
            this->base -= first;
            return;
        }
        at = _mm512_sub_epi32(at, _mm512_set1_epi32(base));
        upper = _mm512_mask_cmpge_epi32_mask(inside, at, _mm512_set1_epi32(2 * LANES));
        way = upper ? FOUR : TWO;
    }
    Vector operator()(const float *from, float otherwise) const {
        const __m512 rest = _mm512_set1_ps(otherwise);
        const float *near = from + base;
        switch (way) {
        case SIDE_BY_SIDE:
            return (Vector)_mm512_mask_loadu_ps(rest, inside, near);
        case TWO:
            return (Vector)_mm512_mask_mov_ps(rest, inside, two(near));
        case FOUR:
            return (Vector)_mm512_mask_mov_ps(
                rest, inside, _mm512_mask_mov_ps(two(near), upper, two(near + 2 * LANES)));
        default:
            return (Vector)_mm512_mask_i32gather_ps(rest, inside, at, from, 4);
        }
    }
    void store(float *to, Vector value) const { _mm512_mask_storeu_ps(to, present, (__m512)value); }

  private:
    __m512 two(const float *from) const {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + LANES));
    }
    const __m512i COUNT =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    enum { SIDE_BY_SIDE, TWO, FOUR, GATHER } way;
    __m512i at;
    __mmask16 present, inside, upper;
    int64_t base;
#else
        : indices(indices), lanes(lanes) {
        (void)base;
    }
    Vector operator()(const float *from, float otherwise) const {
        Vector values{};
        for (int lane = 0; lane < lanes; ++lane)
            values[lane] = indices[lane] >= 0 ? from[indices[lane]] : otherwise;
        return values;
    }
    void store(float *to, Vector value) const { std::memcpy(to, &value, size_t(lanes) * 4); }

  private:
    const int32_t *const indices;
    const int64_t lanes;
#endif
};

} // namespace
