// A block of query rows on its way through the keys: the online softmax. Scores are in units of log2.
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Softmax {
    Index dim;
    float *out, *largest, *total;  // [rows, dim], [rows], [rows]

    void clear(Index rows) {
        std::fill(out, out + rows * dim, 0.0f);
        std::fill(largest, largest + rows, NONE);
        std::fill(total, total + rows, 0.0f);
    }

    // Scores [begin, end) of one row become weights; the rest of [first, last) becomes 0
    void absorb(Index row, float* scores, Index first, Index begin, Index end, Index last) {
        if (begin >= end) {
            std::fill(scores + first, scores + last, 0.0f);
            return;
        }
        Index down = begin / LANES * LANES, up = (end + LANES - 1) / LANES * LANES;
        std::fill(scores + down, scores + begin, NONE);
        std::fill(scores + end, scores + up, NONE);
        Vec most = load(scores + down);
        for (Index j = down + LANES; j < up; j += LANES) most = larger(most, load(scores + j));
        float now = largest[row];
        for (Index lane = 0; lane < LANES; lane++) now = std::max(now, most[lane]);
        if (now == NONE) {  // nothing is seen, or nothing but NaN, which a maximum leaves out
            if (std::any_of(scores + begin, scores + end, [](float score) { return std::isnan(score); }))
                total[row] = std::numeric_limits<float>::quiet_NaN();
            std::fill(scores + first, scores + last, 0.0f);
            return;
        }
        if (now > largest[row]) {
            float decay = std::exp2(largest[row] - now);
            for (Index d = 0; d < dim; d += LANES) store(out + row * dim + d, load(out + row * dim + d) * decay);
            total[row] *= decay;
            largest[row] = now;
        }
        Vec sum = {};
        for (Index j = down; j < up; j += LANES) {
            Vec weight = exp2(load(scores + j) - now);
            store(scores + j, weight);
            sum += weight;
        }
        for (Index lane = 0; lane < LANES; lane++) total[row] += sum[lane];
        if (first < down) std::fill(scores + first, scores + down, 0.0f);
        if (up < last) std::fill(scores + up, scores + last, 0.0f);
    }

    template <class T> void finish(Index row, T* to, float* lse) const {
        float weight = total[row] == 0 ? 0.0f : 1 / total[row];
        const float* from = out + row * dim;
        for (Index d = 0; d < dim; d += PANEL) put(to + d, load(from + d) * weight, load(from + d + LANES) * weight);
        *lse = total[row] == 0 ? NONE : (largest[row] + std::log2(total[row])) * float(M_LN2);
    }
};
