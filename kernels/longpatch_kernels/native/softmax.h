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

    // The largest score takes in [begin, end) of one row; scores that are not seen become NONE up to whole vectors, the
    // rest of [first, last) 0. Whether anything is seen.
    bool raise(Index row, float* scores, Index first, Index begin, Index end, Index last) {
        if (begin >= end) {
            std::fill(scores + first, scores + last, 0.0f);
            return false;
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
            return false;
        }
        if (now > largest[row]) {
            float decay = std::exp2(largest[row] - now);
            for (Index d = 0; d < dim; d += LANES) store(out + row * dim + d, load(out + row * dim + d) * decay);
            total[row] *= decay;
            largest[row] = now;
        }
        if (first < down) std::fill(scores + first, scores + down, 0.0f);
        if (up < last) std::fill(scores + up, scores + last, 0.0f);
        return true;
    }

    // Scores [begin, end) of one row, up to whole vectors, become weights
    void weigh(Index row, float* scores, Index begin, Index end) {
        Vec sum = {};
        for (Index j = begin / LANES * LANES; j < end; j += LANES) {
            Vec weight = exp2(load(scores + j) - largest[row]);
            store(scores + j, weight);
            sum += weight;
        }
        for (Index lane = 0; lane < LANES; lane++) total[row] += sum[lane];
    }

    void absorb(Index row, float* scores, Index first, Index begin, Index end, Index last) {
        if (raise(row, scores, first, begin, end, last)) weigh(row, scores, begin, end);
    }

    template <class T> void finish(Index row, T* to, float* lse) const {
        float weight = total[row] == 0 ? 0.0f : 1 / total[row];
        const float* from = out + row * dim;
        for (Index d = 0; d < dim; d += PANEL) put(to + d, load(from + d) * weight, load(from + d + LANES) * weight);
        *lse = total[row] == 0 ? NONE : (largest[row] + std::log2(total[row])) * float(M_LN2);
    }
};
