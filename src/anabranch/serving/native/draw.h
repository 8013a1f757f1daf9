// The next token of a row of logits: penalty, temperature, top-k, top-p, min-p, then one random number, in the order
// and with the meaning of its torch twin, serving/step/draw.py.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "model.h"
#include "vector.h"

namespace anabranch {

class Drawer {
   public:
    int32_t draw(const float* logits, int vocab, const AnabranchDraw& how) {
        p_.resize(size_t(vocab + LANES - 1) / LANES * LANES);
        std::copy(logits, logits + vocab, p_.begin());
        std::fill(p_.begin() + vocab, p_.end(), -INFINITY);
        for (int i = 0; i < how.seen_count; ++i) {
            float& logit = p_[how.seen[i]];
            logit = logit > 0.0f ? logit / how.penalty : logit * how.penalty;
        }
        if (how.temperature == 0.0f)
            return static_cast<int32_t>(std::max_element(p_.begin(), p_.begin() + vocab) - p_.begin());
        exponentials(vocab, how.temperature);
        if (how.top_k == 0 && how.top_p == 1.0f && how.min_p == 0.0f) return walk_all(vocab, how.u);
        how.top_k > 0 ? keep_most(vocab, how) : keep_above(vocab, how);
        return walk_kept(how.u);
    }

   private:
    static constexpr int BUCKETS = 1024, SHIFT = 20;  // of a float in (0, 1] by its upper bits

    // What is no number, of a model whose logits are none, counts as the largest: it must not be written past the end.
    static int bucket(float p) {
        uint32_t bits;
        std::memcpy(&bits, &p, sizeof bits);
        return std::min(static_cast<int>(bits >> SHIFT), BUCKETS - 1);
    }

    // The most probable token's is one.
    void exponentials(int vocab, float temperature) {
        f32x16 most = splat(-INFINITY);
        for (size_t v = 0; v < p_.size(); v += LANES) most = larger(most, load(&p_[v]));
        const float top = largest(most), scale = 1.0f / temperature;
        for (size_t v = 0; v < p_.size(); v += LANES) store(&p_[v], exponential((load(&p_[v]) - top) * scale));
        std::fill(p_.begin() + vocab, p_.end(), 0.0f);
    }

    // Tokens in their own order: whole strips first, then the strip in which the sum passes u of the total.
    int32_t walk_all(int vocab, double u) {
        constexpr size_t STRIP = 16 * LANES;
        strips_.clear();
        double total = 0.0;
        for (size_t v = 0; v < p_.size(); v += STRIP) {
            f32x16 lanes{};
            for (size_t i = v; i < std::min(v + STRIP, p_.size()); i += LANES) lanes += load(&p_[i]);
            strips_.push_back(total);
            total += sum(lanes);
        }
        const double wanted = u * total;
        const auto after = std::upper_bound(strips_.begin(), strips_.end(), wanted);
        const size_t strip = size_t(after - strips_.begin()) - 1;
        double until = strips_[strip];
        int32_t last = 0;
        for (size_t v = strip * STRIP; v < std::min((strip + 1) * STRIP, size_t(vocab)); ++v) {
            until += p_[v];
            if (p_[v] > 0.0f) last = static_cast<int32_t>(v);
            if (until > wanted) break;
        }
        return last;
    }

    void count(int vocab) {
        counts_.fill(0), sums_.fill(0.0);
        for (int v = 0; v < vocab; ++v) {
            const int b = bucket(p_[v]);
            ++counts_[b], sums_[b] += p_[v];
        }
    }

    // Into kept_ the tokens of buckets from `low` to `high`, the most probable first.
    void gather(int vocab, int low, int high) {
        kept_.clear();
        for (int v = 0; v < vocab; ++v)
            if (const int b = bucket(p_[v]); b >= low && b <= high) kept_.push_back(v);
        std::sort(kept_.begin(), kept_.end(),
                  [&](int a, int b) { return p_[a] > p_[b] || (p_[a] == p_[b] && a < b); });
    }

    // How many of kept_ top-p leaves, where `before` is the sum of more probable ones.
    size_t within(double before, double top_p, double whole) const {
        size_t n = 0;
        while (n < kept_.size() && before < top_p * whole) before += p_[kept_[n++]];
        return n;
    }

    // Into kept_, in the order of tokens, what all settings leave: top-p of what top-k leaves, min-p of both.
    void keep_most(int vocab, const AnabranchDraw& how) {
        count(vocab);
        int low = BUCKETS - 1;
        for (int found = counts_[low]; low > 0 && found < how.top_k;) found += counts_[--low];
        gather(vocab, low, BUCKETS - 1);
        if (kept_.size() > size_t(how.top_k)) kept_.resize(how.top_k);
        double whole = 0.0;
        for (const int v : kept_) whole += p_[v];
        if (how.top_p < 1.0f) kept_.resize(std::max<size_t>(within(0.0, how.top_p, whole), 1));
        while (kept_.size() > 1 && p_[kept_.back()] < how.min_p) kept_.pop_back();
        std::sort(kept_.begin(), kept_.end());
    }

    // The same without top-k, where very many may be left: only the bucket that top-p cuts is sorted.
    void keep_above(int vocab, const AnabranchDraw& how) {
        float least = 0.0f;
        int last = vocab;
        if (how.top_p < 1.0f) {
            count(vocab);
            double whole = 0.0, before = 0.0;
            for (const double sum : sums_) whole += sum;
            int b = BUCKETS - 1;
            for (; b > 0 && before + sums_[b] < how.top_p * whole; --b) before += sums_[b];
            gather(vocab, b, b);
            const size_t n = within(before, how.top_p, whole);
            if (n > 0) least = p_[kept_[n - 1]], last = kept_[n - 1];
        }
        kept_.clear();
        for (int v = 0; v < vocab; ++v)
            if (p_[v] >= how.min_p && (p_[v] > least || (p_[v] == least && v <= last))) kept_.push_back(v);
    }

    int32_t walk_kept(double u) const {
        double total = 0.0, until = 0.0;
        for (const int v : kept_) total += p_[v];
        for (const int v : kept_)
            if ((until += p_[v]) > u * total) return v;
        return kept_.empty() ? 0 : kept_.back();
    }

    std::vector<float> p_;
    std::vector<double> strips_;
    std::vector<int32_t> kept_;
    std::array<int, BUCKETS> counts_;
    std::array<double, BUCKETS> sums_;
};

}  // namespace anabranch
