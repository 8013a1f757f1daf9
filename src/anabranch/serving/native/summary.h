// The most probable token of each row of logits, and the log of their sum of exponentials: gathered block by block while
// a block's logits are in registers, for all of them together leave the caches before the last is computed.
#pragma once
#include <algorithm>
#include <cmath>

#include "matrix.h"

namespace anabranch {

class Summary {
   public:
    struct Row {
        int best;
        float log_total;
    };

    void reserve(int rows, int vocab) {
        vocab_ = vocab, blocks_ = (vocab + BLOCK - 1) / BLOCK;
        most_.resize(size_t(rows) * blocks_);
        totals_.resize(most_.size());
    }

    // Block b of row i.
    void add(int i, int b, const f32x16* logits) {
        f32x16 low = logits[0], high = logits[1];
        if (b + 1 == blocks_) leave_out(vocab_ - b * BLOCK, low), leave_out(vocab_ - b * BLOCK - LANES, high);
        const size_t at = size_t(i) * blocks_ + b;
        most_[at] = largest(larger(low, high));
        totals_[at] = sum(exponential(low - most_[at]) + exponential(high - most_[at]));
    }

    // Of all blocks of row i. Only the best one's logits are read again.
    Row row(int i, const float* logits) const {
        const float *most = &most_[size_t(i) * blocks_], *totals = &totals_[size_t(i) * blocks_];
        const int first = place_of_largest(most, blocks_) * BLOCK;
        const int best = first + place_of_largest(logits + first, std::min(BLOCK, vocab_ - first));
        const float top = logits[best];
        int b = 0;
        f32x16 lanes{};
        for (; b + LANES <= blocks_; b += LANES) lanes += load(totals + b) * exponential(load(most + b) - top);
        float total = sum(lanes);
        for (; b < blocks_; ++b) total += totals[b] * std::exp(most[b] - top);
        return {best, top + std::log(total)};
    }

   private:
    // Lanes from `from` on: they are no tokens.
    static void leave_out(int from, f32x16& logits) {
        for (int lane = std::max(from, 0); lane < LANES; ++lane) logits[lane] = -INFINITY;
    }

    int vocab_ = 0, blocks_ = 0;
    Aligned<float> most_, totals_;
};

}  // namespace anabranch
