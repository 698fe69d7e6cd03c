// Convolutions of few positions, computed as sparse matrices; see runtime.h.
#pragma once
#include "vectors.h"
#include <algorithm>

namespace {

void matrix(const Step &s, float *arena, int thread, int threads) {
    const float *in = arena + s.in;
    const Vector low = broadcast(s.low), high = broadcast(s.high);
    const int64_t begin = threads > 1 ? s.split[thread] : 0;
    const int64_t end = threads > 1 ? s.split[thread + 1] : s.groups;
    for (int64_t group = begin; group < end; ++group) {
        const int32_t *entry = s.entries + s.pointer[group];
        const int32_t *const stop = s.entries + s.pointer[group + 1];
        Vector sum = load_unaligned(s.bias + group * LANES);
        while (entry < stop) {
            const int32_t rows = *entry++;
            const Vector weight = load_some(reinterpret_cast<const float *>(entry + rows), rows);
            sum += weight * gather(in, entry, rows);
            entry += 2 * rows;
        }
        const int32_t *to = s.order + group * LANES;
        const int present = to[LANES - 1] >= 0 ? LANES : int(std::find(to, to + LANES, -1) - to);
        if (s.extra >= 0)
            sum += gather(arena + s.extra, to, present);
        scatter(arena + s.out, to, present, clamp(sum, low, high));
    }
}

} // namespace
