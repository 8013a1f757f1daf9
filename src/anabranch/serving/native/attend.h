// Attention over pages: scores of a page's keys, then its weighted values, whatever their format.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "pairs.h"

namespace anabranch {

constexpr const bf16* NONE = nullptr;

// The sum of products of n numbers, n a multiple of 16.
template <class T>
inline float dot(const float* a, const T* b, int n) {
    f32x16 sums{};
    for (int i = 0; i < n; i += LANES) sums += load(a + i) * load(b + i);
    return sum(sums);
}

// Calls f(2, first) for two of a group's queries after the other, and f(1, last) for one that is left.
template <class F>
inline void two_by_two(int group, const F& f) {
    int g = 0;
    for (; g + 2 <= group; g += 2) f(std::integral_constant<int, 2>(), g);
    if (g < group) f(std::integral_constant<int, 1>(), g);
}

// Scores of G queries against a page's 16 keys. ahead: what to ask memory for meanwhile.
template <int G, class T>
inline void scores_of(const T* keys, int dim, const float* query, float* scores, int64_t stride, const uint8_t* ahead) {
    f32x16 even[G] = {}, odd[G] = {};
    for (int d = 0; d < dim; d += 2, ahead += CHANNELS_BYTES<T>) {
        fetch(ahead, CHANNELS_BYTES<T>);
        f32x16 key0, key1;
        load_channels(keys, d, key0, key1);
        for (int g = 0; g < G; ++g) {
            even[g] += key0 * query[g * dim + d];
            odd[g] += key1 * query[g * dim + d + 1];
        }
    }
    for (int g = 0; g < G; ++g) store(scores + g * stride, even[g] + odd[g]);
}

template <int G, class T>
inline void scores_by_products(const T* keys, int dim, const float* query, float* scores, int64_t stride,
                               const uint8_t* ahead) {
    constexpr int APART = 4;  // sums that need not wait for each other
    alignas(64) int32_t pairs[G][MAX_DIM / 2];
    f32x16 unit[G];
    for (int g = 0; g < G; ++g) unit[g] = Products<T>::round(query + g * dim, dim, pairs[g]);
    typename Products<T>::Sums sums[G][APART] = {};
    for (int d = 0; d < dim / 2; d += APART)
        for (int i = 0; i < APART; ++i, ahead += CHANNELS_BYTES<T>) {
            fetch(ahead, CHANNELS_BYTES<T>);
            for (int g = 0; g < G; ++g)
                sums[g][i] = Products<T>::add(sums[g][i], keys + (d + i) * PAGE, pairs[g][d + i]);
        }
    for (int g = 0; g < G; ++g) {
        f32x16 total{};
        for (int i = 0; i < APART; ++i) total += Products<T>::in_units(sums[g][i], unit[g]);
        store(scores + g * stride, total);
    }
}

template <int G, class T>
inline void score_page(const T* keys, int dim, const float* query, float* scores, int64_t stride, const uint8_t* ahead) {
    if constexpr (Products<T>::HAS)
        scores_by_products<G>(keys, dim, query, scores, stride, ahead);
    else
        scores_of<G>(keys, dim, query, scores, stride, ahead);
}

template <class T>
inline void page_scores(const T* keys, int dim, int group, const float* query, float* scores, int64_t stride,
                        const uint8_t* ahead) {
    two_by_two(group, [&](auto G, int g) {
        score_page<G>(keys, dim, query + g * dim, scores + g * stride, stride, ahead);
    });
}

// Of keys with a scale for each channel, and a zero where given.
template <class T>
inline void page_scores(const T* keys, const float* scale, const bf16* zero, int dim, int group, const float* query,
                        float* scores, int64_t stride, const uint8_t* ahead) {
    two_by_two(group, [&](auto G, int g) {
        alignas(64) float scaled[G * MAX_DIM];
        const float* first = query + g * dim;
        for (int i = 0; i < G * dim; i += dim)
            for (int d = 0; d < dim; d += LANES) store(scaled + i + d, load(first + i + d) * load(scale + d));
        score_page<G>(keys, dim, scaled, scores + g * stride, stride, ahead);
        for (int i = 0; zero && i < G; ++i) {
            float* of = scores + (g + i) * stride;
            store(of, load(of) + dot(first + i * dim, zero, dim));
        }
    });
}

// Adds a page's values, weighted, to the outputs of G queries, WIDTH registers of each at once. Weights have the
// tokens' scales in them; shift: what their zeros add to every number. ahead: values of a later page.
template <int G, int WIDTH, class T>
inline void add_values(const T* values, int dim, int tokens, const float (*weights)[PAGE], const float* shift, float* out,
                       const uint8_t* ahead) {
    f32x16 sums[G][WIDTH];
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) sums[g][j] = load(out + g * dim + j * LANES) + shift[g];
    for (int t = 0; t < tokens; t += PAIRED<T> ? 2 : 1, values += dim, ahead += dim * sizeof(T)) {
        fetch(ahead, WIDTH * LANES * sizeof(T));
        for (int j = 0; j < WIDTH; ++j) {
            if constexpr (PAIRED<T>) {
                f32x16 even, odd;
                load_pairs(values + j * LANES, even, odd);
                if (t + 1 == tokens) odd = f32x16{};  // of a token that is not there yet: zero times it may be no number
                for (int g = 0; g < G; ++g) sums[g][j] += even * weights[g][t] + odd * weights[g][t + 1];
            } else {
                const f32x16 value = load(values + j * LANES);
                for (int g = 0; g < G; ++g) sums[g][j] += value * weights[g][t];
            }
        }
    }
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) store(out + g * dim + j * LANES, sums[g][j]);
}

// What zeros add is no concern of these: int4 has no such products.
template <int G, int WIDTH, class T>
inline void add_by_products(const T* values, int dim, int tokens, const float (*weights)[PAGE], float* out,
                            const uint8_t* ahead) {
    alignas(64) int32_t pairs[G][PAGE / 2];
    f32x16 unit[G];
    for (int g = 0; g < G; ++g) unit[g] = Products<T>::round(weights[g], PAGE, pairs[g]);
    typename Products<T>::Sums sums[G][WIDTH] = {};
    const auto add = [&](const T* from, int pair) {
        for (int j = 0; j < WIDTH; ++j)
            for (int g = 0; g < G; ++g) sums[g][j] = Products<T>::add(sums[g][j], from + j * LANES, pairs[g][pair]);
    };
    for (int pair = 0; pair < tokens / 2; ++pair, values += dim, ahead += dim * sizeof(T)) {
        fetch(ahead, WIDTH * LANES * sizeof(T));
        add(values, pair);
    }
    if (tokens % 2) {  // the other token is not there yet: zero times it may be no number
        T last[WIDTH * LANES];
        for (int i = 0; i < WIDTH * LANES; ++i) last[i] = {values[i].even, {}};
        add(last, tokens / 2);
    }
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) {
            float* to = out + g * dim + j * LANES;
            store(to, load(to) + Products<T>::in_units(sums[g][j], unit[g]));
        }
}

template <int G, int WIDTH, class T>
inline void add_page(const T* values, int dim, int tokens, const float (*weights)[PAGE], const float* shift, float* out,
                     const uint8_t* ahead) {
    if constexpr (Products<T>::HAS)
        add_by_products<G, WIDTH>(values, dim, tokens, weights, out, ahead);
    else
        add_values<G, WIDTH>(values, dim, tokens, weights, shift, out, ahead);
}

template <int G, class T, class S>
inline void values_of(const T* values, const S* scale, const bf16* zero, int dim, int tokens, const float* weights,
                      int64_t weight_stride, float* out, const uint8_t* ahead) {
    alignas(64) float scaled[G][PAGE];
    float shift[G] = {};
    for (int g = 0; g < G; ++g) {
        const float* w = weights + g * weight_stride;
        store(scaled[g], scale ? load(w) * load(scale) : load(w));
        if (zero) shift[g] = dot(w, zero, PAGE);
    }
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES)
        add_page<G, 4>(values + d, dim, tokens, scaled, shift, out + d, ahead + d * sizeof(T));
    for (; d < dim; d += LANES)
        add_page<G, 1>(values + d, dim, tokens, scaled, shift, out + d, ahead + d * sizeof(T));
}

template <class T, class S>
inline void page_values(const T* values, const S* scale, const bf16* zero, int dim, int tokens, int group,
                        const float* weights, int64_t stride, float* out, const uint8_t* ahead) {
    two_by_two(group, [&](auto G, int g) {
        values_of<G>(values, scale, zero, dim, tokens, weights + g * stride, stride, out + g * dim, ahead);
    });
}

// A page's scores, or weighted values, whatever its format; `page` is that of one layer and head.
inline void page_scores(Format format, const PageShape& shape, const uint8_t* page, int group, const float* query,
                        float* scores, int64_t stride, const uint8_t* ahead) {
    const int dim = shape.dim;
    if (format == KV_F32) {
        page_scores(reinterpret_cast<const float*>(page), dim, group, query, scores, stride, ahead);
    } else if (format == KV_BF16) {
        page_scores(reinterpret_cast<const bf16x2*>(page), dim, group, query, scores, stride, ahead);
    } else if (format == KV_INT8) {
        const auto* keys = reinterpret_cast<const int8x2*>(page);
        alignas(64) float scale[MAX_DIM];
        scales_of(keys, dim, scale);
        page_scores(keys, scale, NONE, dim, group, query, scores, stride, ahead);
    } else {
        const auto* halves = reinterpret_cast<const bf16*>(page + shape.numbers());
        alignas(64) float scale[MAX_DIM];
        for (int d = 0; d < dim; d += LANES) store(scale + d, load(halves + d));
        page_scores(reinterpret_cast<const int4x2*>(page), scale, halves + dim, dim, group, query, scores, stride, ahead);
    }
}

inline void page_values(Format format, const PageShape& shape, const uint8_t* page, int tokens, int group,
                        const float* weights, int64_t stride, float* out, const uint8_t* ahead) {
    const int dim = shape.dim;
    const int64_t numbers = shape.numbers();
    if (format == KV_F32) {
        const auto* values = reinterpret_cast<const float*>(page) + numbers;
        page_values(values, NONE, NONE, dim, tokens, group, weights, stride, out, ahead);
    } else if (format == KV_BF16) {
        const auto* values = reinterpret_cast<const bf16x2*>(page) + numbers / 2;
        page_values(values, NONE, NONE, dim, tokens, group, weights, stride, out, ahead);
    } else if (format == KV_INT8) {
        const auto* values = reinterpret_cast<const int8x2*>(page) + numbers / 2;
        alignas(64) float scale[PAGE];
        scales_of(values, PAGE, scale);
        page_values(values, scale, NONE, dim, tokens, group, weights, stride, out, ahead);
    } else {
        const auto* values = reinterpret_cast<const int4x2*>(page + numbers / 2);
        const auto* scale = reinterpret_cast<const bf16*>(page + numbers) + 2 * dim;
        page_values(values, scale, scale + PAGE, dim, tokens, group, weights, stride, out, ahead);
    }
}

// Of one query's attention so far: what its scores are taken relative to, and their exponentials' sums by lane.
struct Weighed {
    float base = -INFINITY;
    f32x16 total{};
};

// How far above the base a score may be. As long as none is, nothing added before changes, and nobody waits for the
// largest score: memory goes on being asked for.
constexpr float SLACK = 8.0f;

// Replaces scores by their exponentials, up to a multiple of 16 by zeros, and brings what was added to `out` before to
// the same scale (Milakov and Gimelshein, arXiv:1805.02867).
inline void weigh(float* scores, int count, Weighed& so_far, float* out, int dim) {
    const int padded = (count + LANES - 1) / LANES * LANES;
    for (int i = count; i < padded; ++i) scores[i] = -INFINITY;
    f32x16 most = load(scores);
    for (int i = LANES; i < padded; i += LANES) most = larger(most, load(scores + i));
    if (any_above(most, so_far.base + SLACK)) {
        const float top = largest(most), scale = std::exp(so_far.base - top);
        so_far.base = top;
        so_far.total *= scale;
        for (int d = 0; d < dim; d += LANES) store(out + d, load(out + d) * scale);
    }
    for (int i = 0; i < padded; i += LANES) {
        store(scores + i, exponential(load(scores + i) - so_far.base));
        if (i + LANES > count)
            for (int j = count; j < padded; ++j) scores[j] = 0.0f;
        so_far.total += load(scores + i);
    }
}

// Softmax over `length` scores in place, padded with zeros to a multiple of 16.
inline void softmax(float* scores, int length) {
    Weighed all;
    weigh(scores, length, all, nullptr, 0);
    const float scale = 1.0f / sum(all.total);
    for (int i = 0; i < length; i += LANES) store(scores + i, load(scores + i) * scale);
}

constexpr int RUN = 2, STRIDE = RUN * PAGE;  // pages at once, and their tokens

// The cached tokens of one row, as one key-value head has them.
struct Cached {
    const int32_t* table;
    int length, head;

    int pages() const { return (length + PAGE - 1) / PAGE; }
    int32_t open() const { return table[pages() - 1]; }  // the page of the row's own token
};

// What is attended to next, from page `first` on: begun to be fetched.
struct Next {
    Cached cached;
    int first;
};

// Queries of one key-value head, already scaled, and what they have gathered from pages so far. The memory is kept from
// call to call.
struct Queries {
    Aligned<float> asked, gathered, scores;  // [count][dim], [count][dim], [count][STRIDE]
    std::vector<float> sums, tops;               // [count][pages], where the mass of pages is asked for
    Aligned<Weighed> weighed;
    int pages = 0;

    // with_mass: the pages whose mass is asked for, 0 for none.
    void begin(int count, int dim, int with_mass) {
        asked.resize(size_t(count) * dim);
        gathered.assign(size_t(count) * dim, 0.0f);
        scores.resize(size_t(count) * STRIDE);
        weighed.assign(count, Weighed());
        pages = with_mass;
        sums.resize(size_t(count) * pages);
        tops.resize(size_t(count) * pages);
    }
};

// Attention of `group` queries, from query `at` on, to pages `from` (a multiple of RUN) to `to`: of some pages the keys,
// then the values, which the cache still holds; then of the next ones.
inline void attend(const Pools& pools, const PageShape& shape, int layer, const Cached& cached, int from, int to,
                   const Next& next, int group, int at, Queries& queries) {
    const int dim = shape.dim;
    const int32_t* table = cached.table;
    float *scores = &queries.scores[size_t(at) * STRIDE], *out = &queries.gathered[size_t(at) * dim];
    const float* query = &queries.asked[size_t(at) * dim];
    const auto place = [&](int p) { return pools.head(shape, table[p], layer, cached.head); };
    // Half `h` of the run that follows page `first`'s, as halves lie in memory: of each page its keys, then its values; of
    // small pages that of the run after it, for no less must be under way.
    const auto later = [&](int first, int h) {
        const int ahead = format_of(table[first]) < KV_INT8 ? RUN : 2 * RUN;
        const int p = first + ahead + h / 2, left = p - cached.pages();
        const auto& of = left < 0 ? cached : next.cached;
        const int32_t page = of.table[left < 0 ? p : std::min(next.first + left, of.pages() - 1)];
        return pools.head(shape, page, layer, of.head) + (h % 2 ? shape.key_bytes(format_of(page)) : 0);
    };
    for (int first = from; first < to; first += RUN) {
        const int end = std::min(first + RUN, to), tokens = std::min(cached.length - first * PAGE, STRIDE);
        for (int p = first; p < end; ++p)
            page_scores(format_of(table[p]), shape, place(p), group, query, scores + (p - first) * PAGE, STRIDE,
                        later(first, p - first));
        for (int g = 0; g < group; ++g)
            weigh(scores + g * STRIDE, tokens, queries.weighed[at + g], out + g * dim, dim);
        for (int p = first; p < end; ++p) {
            const float* weights = scores + (p - first) * PAGE;
            page_values(format_of(table[p]), shape, place(p), std::min(cached.length - p * PAGE, PAGE), group, weights,
                        STRIDE, out, later(first, end - first + p - first));
            for (int g = 0; p < queries.pages && g < group; ++g) {
                queries.sums[g * queries.pages + p] = sum(load(weights + g * STRIDE));
                queries.tops[g * queries.pages + p] = queries.weighed[g].base;
            }
        }
    }
}

// Weighted sums become means. mass: where given, a page's share of the weights is added to mass[page].
inline void finish(Queries& queries, int dim, float* mass) {
    for (size_t g = 0; g < queries.weighed.size(); ++g) {
        const float scale = 1.0f / sum(queries.weighed[g].total), top = queries.weighed[g].base;
        float* out = &queries.gathered[g * dim];
        for (int d = 0; d < dim; d += LANES) store(out + d, load(out + d) * scale);
        for (int p = 0; mass && p < queries.pages; ++p) {
            const size_t i = g * queries.pages + p;
            mass[p] += queries.sums[i] * std::exp(queries.tops[i] - top) * scale;
        }
    }
}

}  // namespace anabranch
