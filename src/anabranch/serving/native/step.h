// One step of a decoder: all rows through all layers, by a team of threads. See `Step::run` for the way of a row.
#pragma once
#include <algorithm>
#include <vector>

#include "attend.h"
#include "groups.h"
#include "heads.h"
#include "matrix.h"
#include "store.h"
#include "summary.h"
#include "team.h"

namespace anabranch {

inline int padded(int n, int to) { return (n + to - 1) / to * to; }

template <class Kind>
class Step {
    using Act = typename Kind::Act;

   public:
    Step(const AnabranchModel& model, Team& team)
        : model_(model),
          team_(team),
          shape_{model.layers, model.kv_heads, model.head_dim},
          wide_(padded(model.hidden, BLOCK)),
          run_(wide_ / BLOCK % 2 ? 1 : 2),
          queries_(model.heads * model.head_dim),
          keys_(model.kv_heads * model.head_dim),
          qkv_wide_(padded(queries_ + 2 * keys_, BLOCK)),
          own_(team.members()),
          store_(model.store ? std::make_unique<Store>(*model.store) : nullptr) {}

    // 1. embed; for each layer: 2. norm, 3. queries, keys and values, 4. rotate and cache, 5. attend, 6. project
    // back, 7. norm and route, 8. gate and up of the chosen experts, 9. down, weighted and summed; 10. logits.
    // Returns a record of the store that could not be read, else NONE.
    int run(const AnabranchRows& rows) {
        reserve(rows);
        rows_ = &rows;
        // As many together as leave every member some tasks, and no more than the nearest cache keeps the queries of.
        const int tasks = rows.rows * model_.kv_heads, group = model_.heads / model_.kv_heads;
        find_alike(rows, std::min(tasks / (4 * team_.members()), MAX_QUERIES / group), alike_);
        team_.run([this](int member) { member_run(member); });
        return store_ ? store_->failed() : Store::NONE;
    }

   private:
    struct Own {
        Aligned<float> out, probabilities;
        Queries queries;
        std::vector<const Act*> inputs;
        std::vector<const float*> wide;  // rows that are routed
        Groups groups;
    };

    void reserve(const AnabranchRows& rows) {
        int pairs = 0, width = 0, top_k = 1, shared = 0;
        for (int l = 0; l < model_.layers; ++l) {
            const auto& layer = model_.layer[l];
            top_k = std::max(top_k, layer.top_k);
            width = std::max(width, layer.width);
            shared = std::max(shared, layer.shared_width);
        }
        pairs = rows.rows * top_k;
        const size_t n = rows.rows;
        residual_.resize(n * wide_);
        normal_.resize(n * Kind::row_acts(wide_));
        normal32_.resize(n * wide_);
        qkv_.resize(n * qkv_wide_);
        turned_.resize(n * queries_);
        attended_.resize(n * Kind::row_acts(queries_));
        ids_.resize(pairs);
        weights_.resize(pairs);
        hidden_.resize(pairs * Kind::row_acts(width));
        shared_.resize(n * Kind::row_acts(shared));
        shared_weight_.resize(n);
        guesses_.resize(store_ ? pairs : 0);
        summary_.reserve(rows.wanted, model_.vocab);
    }

    void member_run(int member) {
        const auto& rows = *rows_;
        for (int r = member; r < rows.rows; r += team_.members()) {
            embed(rows.token[r], &residual_[size_t(r) * wide_]);
        }
        for (int l = 0; l < model_.layers; ++l) {
            const auto& layer = model_.layer[l];
            for (int r = member; r < rows.rows; r += team_.members()) normalise(r, layer.attention_norm, r);
            team_.meet();
            attention(layer, l, member);
            const int from = rows.rows * member / team_.members(), to = rows.rows * (member + 1) / team_.members();
            for (int r = from; r < to; ++r) normalise(r, layer.mlp_norm, r);
            route(layer, l, from, to, own_[member]);
            if (const auto* next = next_stored(l)) guess(*next, from, to, own_[member]);
            team_.meet();
            experts(layer, l, member);
        }
        logits(member);
    }

    void embed(int32_t token, float* to) const {
        const int64_t at = int64_t{token} * model_.hidden;
        for (int d = 0; d < model_.hidden; ++d)
            to[d] = model_.weights == 0 ? static_cast<const float*>(model_.embedding)[at + d]
                                        : widen(static_cast<const bf16*>(model_.embedding)[at + d]);
    }

    // RMS norm of residual row `from` into activation row `to`, there also kept in fp32.
    void normalise(int from, const float* weight, int to) {
        const float* x = &residual_[size_t(from) * wide_];
        float* wide = &normal32_[size_t(to) * wide_];
        f32x16 squares{};
        int d = 0;
        for (; d + LANES <= model_.hidden; d += LANES) squares += load(x + d) * load(x + d);
        float total = sum(squares);
        for (; d < model_.hidden; ++d) total += x[d] * x[d];
        const float scale = 1.0f / std::sqrt(total / model_.hidden + model_.eps);
        for (d = 0; d < model_.hidden; ++d) wide[d] = x[d] * scale * weight[d];
        Kind::write(row(normal_, to, wide_), 0, wide, model_.hidden);
    }

    void attention(const AnabranchLayer& layer, int l, int member) {
        const auto& rows = *rows_;
        auto& own = own_[member];
        gather(own, normal_, wide_, rows.rows);
        multiply(layer.qkv, qkv_wide_, model_.hidden, own, [&](int r, int b, const f32x16* sums) {
            keep(&qkv_[size_t(r) * qkv_wide_], layer.qkv_bias, b, sums);
        });
        team_.meet();
        const int heads = model_.kv_heads, tasks = static_cast<int>(alike_.size()) * heads;
        team_.share(tasks, [&](int from, int to) {
            for (int t = from; t < to; ++t) {
                if (t + 1 < to) fetch_open(l, t + 1);
                const auto& alike = alike_[t / heads];
                for (int i = 0; i < alike.rows; ++i) cache(layer, l, alike.first + i, t % heads);
                if (rows.one_each) attend_rows(l, t, own);
            }
        });
        team_.meet();
        if (!rows.one_each) {
            team_.share(tasks, [&](int from, int to) {
                for (int t = from; t < to; ++t) attend_rows(l, t, own);
            });
            team_.meet();
        }
        gather(own, attended_, queries_, rows.rows);
        multiply(layer.out, wide_, queries_, own, [&](int r, int b, const f32x16* sums) {
            add(&residual_[size_t(r) * wide_], layer.out_bias, b, sums, 1.0f);
        });
        team_.meet();
    }

    // The inputs of `own` times a matrix, shared by the team; done(input, block, sums).
    template <class Done>
    void multiply(const uint8_t* matrix, int outputs, int inputs, const Own& own, const Done& done) {
        team_.share(outputs / BLOCK, [&](int from, int to) { products(matrix, from, to, nullptr, inputs, own, done); });
    }

    // Of some blocks, by this member alone. then: the block that it takes after them, where that is known.
    template <class Done>
    static void products(const uint8_t* matrix, int from, int to, const uint8_t* then, int inputs, const Own& own,
                         const Done& done) {
        const int64_t bytes = Kind::block_bytes(inputs);
        for (int b = from; b < to; ++b)
            multiply_block<Kind>(matrix + b * bytes, b + 1 < to ? matrix + (b + 1) * bytes : then, inputs,
                                 own.inputs.data(), static_cast<int>(own.inputs.size()),
                                 [&](int i, const f32x16* sums) { done(i, b, sums); });
    }

    // Rotates a row's key of one key-value head and the queries of its group; caches key and value. What the
    // projection gave stays as it is: other heads may still take its norm.
    void cache(const AnabranchLayer& layer, int l, int r, int head) {
        const auto& rows = *rows_;
        const Cached to = cached(r, head);
        const int dim = model_.head_dim;
        const int group = model_.heads / model_.kv_heads;
        const float* row = &qkv_[size_t(r) * qkv_wide_];
        const float* key = row + queries_ + head * dim;
        const int64_t at = int64_t{rows.position[r]} * (model_.rotary_dim / 2);
        const float *cosine = model_.cosines + at, *sine = model_.sines + at;
        float q_scale = 0.0f, k_scale = 0.0f;
        if (layer.q_norm && model_.qk_norm_all) {
            q_scale = inverse_rms(row, queries_);
            k_scale = inverse_rms(row + queries_, keys_);
        }
        for (int g = 0; g < group; ++g) {
            const int h = head * group + g;
            float* query = &turned_[size_t(r) * queries_ + h * dim];
            std::copy(row + h * dim, row + (h + 1) * dim, query);
            if (layer.q_norm) {
                const float* weight = layer.q_norm + (model_.qk_norm_all ? h * dim : 0);
                scale_by(query, weight, model_.qk_norm_all ? q_scale : inverse_rms(query, dim), dim);
            }
            rotate(query, cosine, sine, model_.rotary_dim / 2);
            for (int d = 0; d < dim; ++d) query[d] /= std::sqrt(static_cast<float>(dim));
        }
        const int slot = (to.length - 1) % PAGE;
        const int32_t page = to.open();
        float rotated[MAX_DIM];
        std::copy(key, key + dim, rotated);
        if (layer.k_norm) {
            const float* weight = layer.k_norm + (model_.qk_norm_all ? head * dim : 0);
            scale_by(rotated, weight, model_.qk_norm_all ? k_scale : inverse_rms(key, dim), dim);
        }
        rotate(rotated, cosine, sine, model_.rotary_dim / 2);
        write_token(format_of(page), pools().head(shape_, page, l, head), slot, dim, rotated,
                    row + queries_ + keys_ + head * dim);
    }

    Pools pools() const { return {rows_->pool, rows_->pool_pages}; }

    Cached cached(int r, int head) const { return cached_of(*rows_, r, head); }

    // The pages that a task writes its tokens into: a line of each for two channels of the key.
    void fetch_open(int l, int t) const {
        const auto& alike = alike_[t / model_.kv_heads];
        for (int i = 0; i < alike.rows; ++i) {
            const Cached to = cached(alike.first + i, t % model_.kv_heads);
            const int32_t page = to.open();
            fetch(pools().head(shape_, page, l, to.head), shape_.key_bytes(format_of(page)));
        }
    }

    // Task `t` of one layer: rows that are alike, and a key-value head.
    void attend_rows(int l, int t, Own& own) {
        const auto& rows = *rows_;
        const int heads = model_.kv_heads, head = t % heads, group = model_.heads / heads, dim = model_.head_dim;
        const auto& alike = alike_[t / heads];
        const int after = std::min(t + 1, static_cast<int>(alike_.size()) * heads - 1), wide = group * dim;
        const Next then{cached(alike_[after / heads].first, after % heads), 0};
        const Cached first = cached(alike.first, head);
        const Pools pools = this->pools();
        auto& queries = own.queries;
        queries.begin(alike.rows * group, dim, rows.mass ? first.pages() : 0);
        for (int i = 0; i < alike.rows; ++i) {
            const float* query = &turned_[size_t(alike.first + i) * queries_ + size_t(head) * wide];
            std::copy(query, query + wide, &queries.asked[size_t(i) * wide]);
        }
        attend(pools, shape_, l, first, 0, alike.pages, {first, alike.pages}, alike.rows * group, 0, queries);
        for (int i = 0; i < alike.rows; ++i) {
            const Cached mine = cached(alike.first + i, head);
            const Next next = i + 1 < alike.rows ? Next{cached(alike.first + i + 1, head), alike.pages} : then;
            attend(pools, shape_, l, mine, alike.pages, mine.pages(), next, group, i * group, queries);
        }
        const int64_t task = int64_t{alike.first} * heads + head;
        finish(queries, dim, rows.mass ? rows.mass + task * rows.table_stride : nullptr);
        for (int i = 0; i < alike.rows; ++i)
            Kind::write(row(attended_, alike.first + i, queries_), head * wide, &queries.gathered[size_t(i) * wide], wide);
    }

    // The experts of rows and their weights: softmax over all, the largest top_k, ties to the lower number.
    void route(const AnabranchLayer& layer, int l, int from, int to, Own& own) {
        own.wide.clear();
        for (int r = from; r < to; ++r) own.wide.push_back(&normal32_[size_t(r) * wide_]);
        scores(layer, own);
        for (int r = from; r < to; ++r) {
            shared_weight_[r] = weight_of_shared(layer, own.wide[r - from]);
            choose(layer, l, r, scores_of(layer, r - from, own));
        }
    }

    float weight_of_shared(const AnabranchLayer& layer, const float* x) const {
        if (!layer.shared_width || !layer.shared_gate) return 1.0f;
        float dot = 0.0f;
        for (int d = 0; d < model_.hidden; ++d) dot += x[d] * layer.shared_gate[d];
        return 1.0f / (1.0f + std::exp(-dot));
    }

    // p: the row's scores, which are used up.
    void choose(const AnabranchLayer& layer, int l, int r, float* p) {
        const int k = layer.top_k;
        int32_t* ids = &ids_[size_t(r) * k];
        float* weights = &weights_[size_t(r) * k];
        if (!layer.router) {
            ids[0] = 0, weights[0] = 1.0f;
            return;
        }
        softmax(p, layer.experts);
        float total = 0.0f;
        for (int i = 0; i < k; ++i) {
            const int best = place_of_largest(p, layer.experts);
            ids[i] = best, weights[i] = p[best], total += p[best], p[best] = -1.0f;
        }
        if (model_.normalise_top_k)
            for (int i = 0; i < k; ++i) weights[i] /= total;
        if (rows_->routed) std::copy(ids, ids + k, rows_->routed + (int64_t{l} * rows_->rows + r) * k);
    }

    // What the router, where there is one, gives for each of `own.wide`.
    void scores(const AnabranchLayer& layer, Own& own) const {
        const int blocks = padded(layer.experts, BLOCK) / BLOCK, hidden = model_.hidden;
        own.probabilities.resize(own.wide.size() * blocks * BLOCK);
        for (int b = 0; layer.router && b < blocks; ++b)
            multiply_block<F32>(layer.router + b * F32::block_bytes(hidden), nullptr, hidden, own.wide.data(),
                                static_cast<int>(own.wide.size()),
                                [&](int i, const f32x16* sums) { keep(scores_of(layer, i, own), nullptr, b, sums); });
    }

    static float* scores_of(const AnabranchLayer& layer, int i, Own& own) {
        return own.probabilities.data() + size_t(i) * padded(layer.experts, BLOCK);
    }

    const AnabranchLayer* next_stored(int l) const {
        if (store_)
            while (++l < model_.layers)
                if (!model_.layer[l].gate_up) return &model_.layer[l];
        return nullptr;
    }

    // What rows will probably choose in a later layer: that layer's router, applied to the rows as they are now (Eliseev
    // and Mazur, arXiv:2312.17238). The scale of its norm is left out: it does not change the order.
    void guess(const AnabranchLayer& later, int from, int to, Own& own) {
        own.out.resize(size_t(to - from) * model_.hidden);
        own.wide.clear();
        for (int r = from; r < to; ++r) {
            own.wide.push_back(&own.out[size_t(r - from) * model_.hidden]);
            for (int d = 0; d < model_.hidden; ++d)
                own.out[size_t(r - from) * model_.hidden + d] = residual_[size_t(r) * wide_ + d] * later.mlp_norm[d];
        }
        scores(later, own);
        for (int r = from; r < to; ++r) {
            float* p = scores_of(later, r - from, own);
            for (int i = 0; i < later.top_k; ++i) {
                const int best = place_of_largest(p, later.experts);
                guesses_[size_t(r) * later.top_k + i] = best, p[best] = -INFINITY;
            }
        }
    }

    void expect(const AnabranchLayer& later) {
        std::vector<int> votes(later.experts), records;
        for (int i = 0; i < rows_->rows * later.top_k; ++i) ++votes[guesses_[i]];
        for (int e = 0; e < later.experts; ++e)
            if (votes[e]) records.push_back(later.first_record + e);
        std::stable_sort(records.begin(), records.end(), [&](int a, int b) {
            return votes[a - later.first_record] > votes[b - later.first_record];
        });
        store_->expect(records);
    }

    // All experts in one round, or as many of them as the store has room for in each; in order, so that sums are the
    // same. order_: that of the gates and ups, in which resident experts come first.
    void experts(const AnabranchLayer& layer, int l, int member) {
        auto& own = own_[member];
        own.groups.sort(ids_.data(), rows_->rows * layer.top_k, layer.experts);
        if (layer.gate_up) return one_round(layer, own, own.groups.active, true);
        const auto all = own.groups.active;
        for (auto from = all.begin(); from != all.end();) {
            const auto to = from + std::min<ptrdiff_t>(store_->slots(), all.end() - from);
            own.groups.active.assign(from, to);
            if (member == 0) {
                std::vector<int> records;
                for (auto e = from; e != to; ++e) records.push_back(layer.first_record + *e);
                order_ = store_->need(records);
                for (int& record : order_) record -= layer.first_record;
                const auto* next = next_stored(l);
                if (next && to == all.end()) expect(*next);
            }
            team_.meet();
            one_round(layer, own, order_, to == all.end());
            if (member == 0) store_->release();
            from = to;
        }
    }

    const uint8_t* gate_up_of(const AnabranchLayer& layer, int e) {
        return layer.gate_up ? layer.gate_up + e * gate_up_bytes(layer) : store_->wait(layer.first_record + e);
    }
    // The first of a run of blocks.
    const uint8_t* down_of(const AnabranchLayer& layer, int e, int b) {
        const int64_t bytes = Kind::block_bytes(layer.width);
        if (layer.down) return layer.down + (int64_t{b} * layer.experts + e * run_) * bytes;
        return store_->wait(layer.first_record + e) + gate_up_bytes(layer) + b * bytes;
    }
    int64_t gate_up_bytes(const AnabranchLayer& layer) const {
        return layer.width * 2 / BLOCK * Kind::block_bytes(model_.hidden);
    }

    // Tasks of gates and ups are pairs of blocks: a group of int8 activations is as long as what two of them give.
    void one_round(const AnabranchLayer& layer, Own& own, const std::vector<int>& order, bool last) {
        const int n = rows_->rows, width = layer.width, pairs = width / BLOCK;
        const auto& groups = own.groups;
        const int shared_pairs = last ? layer.shared_width / BLOCK : 0;
        const int tasks = static_cast<int>(groups.active.size()) * pairs + shared_pairs;
        team_.share(tasks, [&](int from, int to) {
            for (int t = from; t < to; ++t) {
                if (t < shared_pairs) {
                    gather(own, normal_, wide_, n);
                    gate_up(layer.shared_gate_up, t, t + 1 < to, own,
                            [&](int m) { return row(shared_, m, layer.shared_width); });
                    continue;
                }
                const int e = order[(t - shared_pairs) / pairs];
                const int* members = &groups.pair[groups.start[e]];
                own.inputs.resize(groups.start[e + 1] - groups.start[e]);
                for (size_t m = 0; m < own.inputs.size(); ++m)
                    own.inputs[m] = row(normal_, members[m] / layer.top_k, wide_);
                gate_up(gate_up_of(layer, e), (t - shared_pairs) % pairs, t + 1 < to, own,
                        [&](int m) { return row(hidden_, members[m], width); });
            }
        });
        team_.meet();
        team_.share(wide_ / BLOCK / run_, [&](int from, int to) {
            for (int r = from; r < to; ++r) down(layer, r * run_, own, last);
        });
        team_.meet();
    }

    // more: the next pair, which mostly follows in memory, is this member's too.
    template <class To>
    void gate_up(const uint8_t* weights, int pair, bool more, Own& own, const To& to) {
        const int count = static_cast<int>(own.inputs.size());
        own.out.resize(size_t(count) * BLOCK);
        const uint8_t* then = more ? weights + (2 * pair + 2) * Kind::block_bytes(model_.hidden) : nullptr;
        products(weights, 2 * pair, 2 * pair + 2, then, model_.hidden, own, [&](int m, int b, const f32x16* sums) {
            store(&own.out[m * BLOCK + b % 2 * LANES], silu(sums[0]) * sums[1]);
        });
        for (int m = 0; m < count; ++m) Kind::write(to(m), pair * BLOCK, &own.out[m * BLOCK], BLOCK);
    }

    // A run of blocks of outputs, from `first` on, of every expert: one member adds them all, in the order of experts.
    void down(const AnabranchLayer& layer, int first, Own& own, bool last) {
        const auto& groups = own.groups;
        for (size_t i = 0; i < groups.active.size(); ++i) {
            const int e = groups.active[i];
            const bool known = layer.down && i + 1 < groups.active.size();
            const uint8_t* then = known ? down_of(layer, groups.active[i + 1], first) : nullptr;
            const int* members = &groups.pair[groups.start[e]];
            own.inputs.resize(groups.start[e + 1] - groups.start[e]);
            for (size_t m = 0; m < own.inputs.size(); ++m) own.inputs[m] = row(hidden_, members[m], layer.width);
            const auto add_to = [&](int m, int b, const f32x16* sums) {
                add(&residual_[size_t(members[m] / layer.top_k) * wide_], nullptr, first + b, sums, weights_[members[m]]);
            };
            products(down_of(layer, e, first), 0, run_, then, layer.width, own, add_to);
        }
        if (last && layer.shared_width) {
            gather(own, shared_, layer.shared_width, rows_->rows);
            products(layer.shared_down, first, first + run_, nullptr, layer.shared_width, own,
                     [&](int r, int b, const f32x16* sums) {
                         add(&residual_[size_t(r) * wide_], nullptr, b, sums, shared_weight_[r]);
                     });
        }
    }

    void logits(int member) {
        const auto& rows = *rows_;
        const int wide = padded(model_.vocab, BLOCK);
        // Norms write over activations of other rows: all members are done with them.
        for (int i = member; i < rows.wanted; i += team_.members()) normalise(rows.want[i], model_.final_norm, i);
        team_.meet();
        auto& own = own_[member];
        gather(own, normal_, wide_, rows.wanted);
        multiply(model_.head, wide, model_.hidden, own, [&](int i, int b, const f32x16* sums) {
            keep(rows.logits + int64_t{i} * wide, nullptr, b, sums);
            summary_.add(i, b, sums);
        });
        team_.meet();
        for (int i = member; i < rows.wanted; i += team_.members()) {
            const auto row = summary_.row(i, rows.logits + int64_t{i} * wide);
            rows.best[i] = row.best, rows.log_total[i] = row.log_total;
        }
    }

    float inverse_rms(const float* x, int n) const { return anabranch::inverse_rms(x, n, model_.eps); }

    static Act* row(Aligned<Act>& rows, int r, int numbers) { return &rows[r * Kind::row_acts(numbers)]; }

    static void gather(Own& own, Aligned<Act>& rows, int numbers, int count) {
        own.inputs.resize(count);
        for (int r = 0; r < count; ++r) own.inputs[r] = row(rows, r, numbers);
    }

    const AnabranchModel model_;
    Team& team_;
    const PageShape shape_;
    const int wide_, run_;  // run_: blocks of an expert's down projection that lie together
    const int queries_, keys_, qkv_wide_;
    const AnabranchRows* rows_ = nullptr;
    std::vector<Own> own_;
    Aligned<float> residual_, normal32_, qkv_, turned_, weights_, shared_weight_;
    Summary summary_;
    Aligned<Act> normal_, attended_, hidden_, shared_;
    std::vector<int32_t> ids_, guesses_;
    std::vector<int> order_;
    std::vector<Alike> alike_;
    std::unique_ptr<Store> store_;
};

}  // namespace anabranch
