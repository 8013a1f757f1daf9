// Keys and values in pages of 16 tokens, and attention over them.
//
// A page holds, for each layer and key-value head, keys as [head_dim][16] (a register is one channel of all tokens:
// scores need no sum across lanes) and values as [16][head_dim]. In int8 a line of these, a key's channel or a token's
// value, has a scale, kept in the lowest bits of its first eight codes: an int8 page is half a bf16 one to the byte. In
// int4 a line has a bf16 scale and zero beside its codes (number = zero + scale * code). Both are folded into what they
// are multiplied with: no number is restored. A byte of int4 holds two neighbouring channels of a key (the even one in
// its low half), or two neighbouring tokens of a value.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace anabranch {

constexpr int PAGE = LANES;       // tokens of a page
constexpr int FORMAT_SHIFT = 28;  // of a page's number: the upper bits are its format
constexpr int MAX_DIM = 512;      // of a head

enum Format : int32_t { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2, KV_INT4 = 3, FORMATS = 4 };

// Two codes of 4 bits.
struct int4x2 {
    uint8_t bits;
};

inline Format format_of(int32_t page) { return static_cast<Format>(page >> FORMAT_SHIFT); }

struct PageShape {
    int layers, heads, dim;  // key-value heads

    int64_t numbers() const { return int64_t{PAGE} * dim; }
    int64_t head_bytes(Format format) const {
        if (format == KV_F32) return 2 * numbers() * 4;
        if (format == KV_BF16) return 2 * numbers() * 2;
        if (format == KV_INT8) return 2 * numbers();
        return numbers() + (dim + PAGE) * 4;
    }
    int64_t key_bytes(Format format) const {
        return format == KV_INT4 ? numbers() / 2 : head_bytes(format) / 2;
    }
    int64_t layer_bytes(Format format) const { return heads * head_bytes(format); }
    int64_t page_bytes(Format format) const { return layers * layer_bytes(format); }
};

struct Pools {
    uint8_t* data[FORMATS];

    explicit Pools(uint8_t* const* pools) { std::copy(pools, pools + FORMATS, data); }

    uint8_t* head(const PageShape& shape, int32_t page, int layer, int head) const {
        const auto format = format_of(page);
        const int64_t index = page & ((1 << FORMAT_SHIFT) - 1);
        return data[format] + index * shape.page_bytes(format) + layer * shape.layer_bytes(format) +
               head * shape.head_bytes(format);
    }
};

template <class T>
inline void write_token(uint8_t* page, int slot, int dim, const float* key, const float* value) {
    T* keys = reinterpret_cast<T*>(page);
    T* values = keys + int64_t{PAGE} * dim;
    for (int d = 0; d < dim; ++d) narrow(keys + d * PAGE + slot, key[d]);
    for (int d = 0; d < dim; ++d) narrow(values + slot * dim + d, value[d]);
}

inline void write_token(Format format, uint8_t* page, int slot, int dim, const float* key, const float* value) {
    format == KV_F32 ? write_token<float>(page, slot, dim, key, value)
                     : write_token<bf16>(page, slot, dim, key, value);
}

// What the scale of an int8 line may be: steps of an eighth of an octave, for numbers up to 119,000.
inline const std::array<float, 256> SCALES = [] {
    std::array<float, 256> made;
    for (int i = 0; i < 256; ++i) made[i] = std::exp2(i / 8.0f - 22.0f);
    return made;
}();

// Of an int8 line: bit i of the scale's place in SCALES is the lowest bit of code i. The product moves them together.
inline float scale_of(const int8_t* line) {
    uint64_t codes;
    std::memcpy(&codes, line, sizeof codes);
    return SCALES[(codes & 0x0101010101010101) * 0x0102040810204080 >> 56];
}

constexpr const bf16* NONE = nullptr;

// Of two numbers of each token, as they lie in a page.
template <class T>
constexpr int PAIR_BYTES = std::is_same_v<T, int4x2> ? 1 : 2 * sizeof(T);

// Asks for the lines that so many bytes at `ahead` are in. Pages lie anywhere in memory, where the processor guesses
// nothing: a later page is fetched line by line while this one is computed from. Asked for at once, lines would queue.
inline void fetch(const uint8_t* ahead, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at);
}

// Channels d and d + 1 of all tokens of a page.
template <class T>
inline void load_pair(const T* keys, int d, f32x16& even, f32x16& odd) {
    even = load(keys + d * PAGE);
    odd = load(keys + (d + 1) * PAGE);
}
inline void load_pair(const int4x2* keys, int d, f32x16& even, f32x16& odd) {
    split(&keys[d / 2 * PAGE].bits, even, odd);
}

// The sum of products of n numbers, n a multiple of 16.
template <class T>
inline float dot(const float* a, const T* b, int n) {
    f32x16 sums{};
    for (int i = 0; i < n; i += LANES) sums += load(a + i) * load(b + i);
    return sum(sums);
}

// Scores of G queries against a page's 16 keys. scale, zero: of each channel, null where there is none. ahead: keys of a
// later page.
template <int G, class T, class S>
inline void scores_of(const T* keys, const S* scale, const bf16* zero, int dim, const float* query, float* scores,
                      int64_t score_stride, const uint8_t* ahead) {
    f32x16 even[G] = {}, odd[G] = {};
    for (int d = 0; d < dim; d += 2, ahead += PAGE * PAIR_BYTES<T>) {
        fetch(ahead, PAGE * PAIR_BYTES<T>);
        f32x16 key0, key1;
        load_pair(keys, d, key0, key1);
        for (int g = 0; g < G; ++g) {
            const float* q = query + g * dim;
            even[g] += key0 * (scale ? q[d] * widen(scale[d]) : q[d]);
            odd[g] += key1 * (scale ? q[d + 1] * widen(scale[d + 1]) : q[d + 1]);
        }
    }
    for (int g = 0; g < G; ++g) {
        const f32x16 total = even[g] + odd[g];
        store(scores + g * score_stride, zero ? total + dot(query + g * dim, zero, dim) : total);
    }
}

template <class T, class S>
inline void page_scores(const T* keys, const S* scale, const bf16* zero, int dim, int group, const float* query,
                        float* scores, int64_t stride, const uint8_t* ahead) {
    int g = 0;
    for (; g + 2 <= group; g += 2)
        scores_of<2>(keys, scale, zero, dim, query + g * dim, scores + g * stride, stride, ahead);
    for (; g < group; ++g) scores_of<1>(keys, scale, zero, dim, query + g * dim, scores + g * stride, stride, ahead);
}

// Adds a page's values, weighted, to the outputs of G queries, WIDTH registers of each at once. Weights have the
// tokens' scales in them; shift: what their zeros add to every number. ahead: values of a later page.
template <int G, int WIDTH, class T>
inline void add_values(const T* values, int dim, int tokens, const float (*weights)[PAGE], const float*, float* out,
                       const uint8_t* ahead) {
    f32x16 sums[G][WIDTH];
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) sums[g][j] = load(out + g * dim + j * LANES);
    for (int t = 0; t < tokens; ++t, ahead += dim * sizeof(T)) {
        fetch(ahead, WIDTH * LANES * sizeof(T));
        for (int j = 0; j < WIDTH; ++j) {
            const f32x16 value = load(values + int64_t{t} * dim + j * LANES);
            for (int g = 0; g < G; ++g) sums[g][j] += value * weights[g][t];
        }
    }
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) store(out + g * dim + j * LANES, sums[g][j]);
}

// An int4 page is full: all its tokens are added, two by two.
template <int G, int WIDTH>
inline void add_values(const int4x2* values, int dim, int, const float (*weights)[PAGE], const float* shift,
                       float* out, const uint8_t* ahead) {
    f32x16 sums[G][WIDTH];
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) sums[g][j] = load(out + g * dim + j * LANES) + shift[g];
    for (int t = 0; t < PAGE; t += 2, ahead += dim) {
        fetch(ahead, WIDTH * LANES);
        for (int j = 0; j < WIDTH; ++j) {
            f32x16 even, odd;
            split(&values[t / 2 * dim + j * LANES].bits, even, odd);
            for (int g = 0; g < G; ++g) sums[g][j] += even * weights[g][t] + odd * weights[g][t + 1];
        }
    }
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < WIDTH; ++j) store(out + g * dim + j * LANES, sums[g][j]);
}

template <int G, class T, class S>
inline void values_of(const T* values, const S* scale, const bf16* zero, int dim, int tokens, const float* weights,
                      int64_t weight_stride, float* out, const uint8_t* ahead) {
    float scaled[G][PAGE], shift[G] = {};
    for (int g = 0; g < G; ++g) {
        const float* w = weights + g * weight_stride;
        store(scaled[g], scale ? load(w) * load(scale) : load(w));
        if (zero) shift[g] = dot(w, zero, PAGE);
    }
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES)
        add_values<G, 4>(values + d, dim, tokens, scaled, shift, out + d, ahead + d * sizeof(T));
    for (; d < dim; d += LANES)
        add_values<G, 1>(values + d, dim, tokens, scaled, shift, out + d, ahead + d * sizeof(T));
}

template <class T, class S>
inline void page_values(const T* values, const S* scale, const bf16* zero, int dim, int tokens, int group,
                        const float* weights, int64_t stride, float* out, const uint8_t* ahead) {
    int g = 0;
    for (; g + 2 <= group; g += 2)
        values_of<2>(values, scale, zero, dim, tokens, weights + g * stride, stride, out + g * dim, ahead);
    for (; g < group; ++g)
        values_of<1>(values, scale, zero, dim, tokens, weights + g * stride, stride, out + g * dim, ahead);
}

// A page's scores, or weighted values, whatever its format; `page` is that of one layer and head.
inline void page_scores(Format format, const PageShape& shape, const uint8_t* page, int group, const float* query,
                        float* scores, int64_t stride, const uint8_t* ahead) {
    const int dim = shape.dim;
    if (format == KV_F32) {
        page_scores(reinterpret_cast<const float*>(page), NONE, NONE, dim, group, query, scores, stride, ahead);
    } else if (format == KV_BF16) {
        page_scores(reinterpret_cast<const bf16*>(page), NONE, NONE, dim, group, query, scores, stride, ahead);
    } else if (format == KV_INT8) {
        const auto* keys = reinterpret_cast<const int8_t*>(page);
        float scale[MAX_DIM];
        for (int d = 0; d < dim; ++d) scale[d] = scale_of(keys + d * PAGE);
        page_scores(keys, scale, NONE, dim, group, query, scores, stride, ahead);
    } else {
        const auto* scale = reinterpret_cast<const bf16*>(page + shape.numbers());
        page_scores(reinterpret_cast<const int4x2*>(page), scale, scale + dim, dim, group, query, scores, stride, ahead);
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
        const auto* values = reinterpret_cast<const bf16*>(page) + numbers;
        page_values(values, NONE, NONE, dim, tokens, group, weights, stride, out, ahead);
    } else if (format == KV_INT8) {
        const auto* values = reinterpret_cast<const int8_t*>(page) + numbers;
        float scale[PAGE];
        for (int t = 0; t < PAGE; ++t) scale[t] = scale_of(values + t * dim);
        page_values(values, scale, NONE, dim, tokens, group, weights, stride, out, ahead);
    } else {
        const auto* values = reinterpret_cast<const int4x2*>(page + numbers / 2);
        const auto* scale = reinterpret_cast<const bf16*>(page + numbers) + 2 * dim;
        page_values(values, scale, scale + PAGE, dim, tokens, group, weights, stride, out, ahead);
    }
}

// Of one query's attention so far: the largest score, and the sum of exponentials relative to it.
struct Weighed {
    float top = -INFINITY, total = 0.0f;
};

// Replaces scores by their exponentials, up to a multiple of 16 by zeros, and brings what was added to `out` before to
// the same scale (Milakov and Gimelshein, arXiv:1805.02867).
inline void weigh(float* scores, int count, Weighed& so_far, float* out, int dim) {
    const int padded = (count + LANES - 1) / LANES * LANES;
    for (int i = count; i < padded; ++i) scores[i] = -INFINITY;
    f32x16 most = splat(so_far.top);
    for (int i = 0; i < padded; i += LANES) most = larger(most, load(scores + i));
    const float top = largest(most);
    if (top > so_far.top && so_far.total > 0.0f) {
        const float scale = std::exp(so_far.top - top);
        so_far.total *= scale;
        for (int d = 0; d < dim; d += LANES) store(out + d, load(out + d) * scale);
    }
    so_far.top = top;
    f32x16 total{};
    for (int i = 0; i < padded; i += LANES) {
        store(scores + i, exponential(load(scores + i) - top));
        if (i + LANES > count)
            for (int j = count; j < padded; ++j) scores[j] = 0.0f;
        total += load(scores + i);
    }
    so_far.total += sum(total);
}

// Softmax over `length` scores in place, padded with zeros to a multiple of 16.
inline void softmax(float* scores, int length) {
    Weighed all;
    weigh(scores, length, all, nullptr, 0);
    const float scale = 1.0f / all.total;
    for (int i = 0; i < length; i += LANES) store(scores + i, load(scores + i) * scale);
}

// What attention needs beside its output; kept from call to call.
struct AttentionScratch {
    std::vector<float> numbers;
    std::vector<Weighed> weighed;
};

// The cached tokens of one row, as one key-value head has them.
struct Cached {
    const int32_t* table;
    int length, head;

    int pages() const { return (length + PAGE - 1) / PAGE; }
    int32_t open() const { return table[pages() - 1]; }  // the page of the row's own token
};

// Attention of one token's G queries (of one key-value head, already scaled) over its cached tokens: of some pages the
// keys, then the values, which the cache still holds; then of the next ones. then: what is attended to after it, begun to
// be fetched. mass: where given, a page's share of the weights is added to mass[page].
inline void attend(const Pools& pools, const PageShape& shape, int layer, const Cached& cached, const Cached& then,
                   int group, const float* query, float* out, AttentionScratch& scratch, float* mass) {
    constexpr int RUN = 4, STRIDE = RUN * PAGE;  // pages at once, and their tokens
    const int dim = shape.dim, pages = cached.pages();
    const int32_t* table = cached.table;
    const auto place = [&](int p) { return pools.head(shape, table[p], layer, cached.head); };
    // Of page `p` one run later: its keys, or its values.
    const auto later = [&](int p, bool values) {
        const bool mine = p + RUN < pages;
        const auto& from = mine ? cached : then;
        const int32_t page = from.table[mine ? p + RUN : std::min(p + RUN - pages, from.pages() - 1)];
        return pools.head(shape, page, layer, from.head) + (values ? shape.key_bytes(format_of(page)) : 0);
    };
    auto& weighed = scratch.weighed;
    weighed.assign(group, Weighed());
    auto& numbers = scratch.numbers;
    numbers.resize(std::max<size_t>(numbers.size(), group * (STRIDE + (mass ? 2 * pages : 0))));
    float *scores = numbers.data(), *sums = scores + group * STRIDE, *tops = sums + group * pages;
    std::fill(out, out + group * dim, 0.0f);
    for (int first = 0; first < pages; first += RUN) {
        const int end = std::min(first + RUN, pages), tokens = std::min(cached.length - first * PAGE, STRIDE);
        for (int p = first; p < end; ++p)
            page_scores(format_of(table[p]), shape, place(p), group, query, scores + (p - first) * PAGE, STRIDE,
                        later(p, false));
        for (int g = 0; g < group; ++g) weigh(scores + g * STRIDE, tokens, weighed[g], out + g * dim, dim);
        for (int p = first; p < end; ++p) {
            const float* weights = scores + (p - first) * PAGE;
            page_values(format_of(table[p]), shape, place(p), std::min(cached.length - p * PAGE, PAGE), group, weights,
                        STRIDE, out, later(p, true));
            for (int g = 0; mass && g < group; ++g) {
                sums[g * pages + p] = sum(load(weights + g * STRIDE));
                tops[g * pages + p] = weighed[g].top;
            }
        }
    }
    for (int g = 0; g < group; ++g) {
        const float scale = 1.0f / weighed[g].total;
        for (int d = 0; d < dim; d += LANES) store(out + g * dim + d, load(out + g * dim + d) * scale);
        for (int p = 0; mass && p < pages; ++p)
            mass[p] += sums[g * pages + p] * std::exp(tops[g * pages + p] - weighed[g].top) * scale;
    }
}

}  // namespace anabranch
