// Keys and values in pages of 16 tokens, and attention over them.
//
// A page holds, for each layer and key-value head, keys as [head_dim][16] (a register is one channel of all tokens:
// scores need no sum across lanes) and values as [16][head_dim]. In int8 a key channel has one scale a page and a
// value one scale a token; both are folded into what they are multiplied with.
#pragma once
#include <vector>

#include "vector.h"

namespace anabranch {

constexpr int PAGE = LANES;       // tokens of a page
constexpr int FORMAT_SHIFT = 28;  // of a page's number: the upper bits are its format

enum Format : int32_t { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2, FORMATS = 3 };

struct PageShape {
    int layers, heads, dim;  // key-value heads

    int64_t numbers() const { return int64_t{PAGE} * dim; }
    int64_t head_bytes(Format format) const {
        if (format == KV_F32) return 2 * numbers() * 4;
        if (format == KV_BF16) return 2 * numbers() * 2;
        return 2 * numbers() + (dim + PAGE) * 4;
    }
    int64_t layer_bytes(Format format) const { return heads * head_bytes(format); }
    int64_t page_bytes(Format format) const { return layers * layer_bytes(format); }
};

struct Pools {
    uint8_t* data[FORMATS];

    uint8_t* head(const PageShape& shape, int32_t page, int layer, int head) const {
        const auto format = static_cast<Format>(page >> FORMAT_SHIFT);
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

// Scores of G queries against a page's 16 keys.
template <class T>
inline void page_scores(const T* keys, const float* channel_scale, int dim, int group, const float* query,
                        int stride, float* scores, int64_t score_stride) {
    for (int g = 0; g < group; ++g) {
        f32x16 even{}, odd{};
        const float* q = query + g * stride;
        for (int d = 0; d < dim; d += 2) {
            const float scale0 = channel_scale ? channel_scale[d] : 1.0f;
            const float scale1 = channel_scale ? channel_scale[d + 1] : 1.0f;
            even += load(keys + d * PAGE) * (q[d] * scale0);
            odd += load(keys + (d + 1) * PAGE) * (q[d + 1] * scale1);
        }
        store(scores + g * score_stride, even + odd);
    }
}

// Adds a page's values, weighted, to the outputs of G queries: WIDTH registers of each at once.
template <class T, int WIDTH>
inline void add_values(const T* values, const float* token_scale, int dim, int tokens, const float* weights,
                       float* out) {
    f32x16 sums[WIDTH];
    for (int j = 0; j < WIDTH; ++j) sums[j] = load(out + j * LANES);
    for (int t = 0; t < tokens; ++t) {
        const float w = token_scale ? weights[t] * token_scale[t] : weights[t];
        for (int j = 0; j < WIDTH; ++j) sums[j] += load(values + int64_t{t} * dim + j * LANES) * w;
    }
    for (int j = 0; j < WIDTH; ++j) store(out + j * LANES, sums[j]);
}

template <class T>
inline void page_values(const T* values, const float* token_scale, int dim, int tokens, int group,
                        const float* weights, int64_t weight_stride, float* out, int stride) {
    for (int g = 0; g < group; ++g) {
        int d = 0;
        for (; d + 4 * LANES <= dim; d += 4 * LANES)
            add_values<T, 4>(values + d, token_scale, dim, tokens, weights + g * weight_stride, out + g * stride + d);
        for (; d < dim; d += LANES)
            add_values<T, 1>(values + d, token_scale, dim, tokens, weights + g * weight_stride, out + g * stride + d);
    }
}

// Softmax over `length` scores in place, padded with zeros to whole pages.
inline void softmax(float* scores, int length) {
    const int padded = (length + PAGE - 1) / PAGE * PAGE;
    for (int i = length; i < padded; ++i) scores[i] = -INFINITY;
    f32x16 most = splat(-INFINITY);
    for (int i = 0; i < padded; i += PAGE) most = larger(most, load(scores + i));
    const float top = largest(most);
    f32x16 total{};
    for (int i = 0; i < padded; i += PAGE) {
        const f32x16 e = exponential(load(scores + i) - top);
        store(scores + i, e);
        if (i + PAGE > length)
            for (int j = length; j < padded; ++j) scores[j] = 0.0f;
        total += load(scores + i);
    }
    const float scale = 1.0f / sum(total);
    for (int i = 0; i < padded; i += PAGE) store(scores + i, load(scores + i) * scale);
}

// Attention of one token's G queries (of one key-value head, already scaled) over `length` cached tokens.
// scratch: group x padded length. mass: where given, this page's share of the weights is added to mass[page].
inline void attend(const Pools& pools, const PageShape& shape, const int32_t* table, int length, int layer, int head,
                   int group, const float* query, float* out, std::vector<float>& scratch, float* mass) {
    const int dim = shape.dim, pages = (length + PAGE - 1) / PAGE;
    const int64_t stride = int64_t{pages} * PAGE;
    if (static_cast<int64_t>(scratch.size()) < group * stride) scratch.resize(group * stride * 2);
    float* scores = scratch.data();
    for (int p = 0; p < pages; ++p) {
        const uint8_t* page = pools.head(shape, table[p], layer, head);
        float* at = scores + p * PAGE;
        switch (table[p] >> FORMAT_SHIFT) {
            case KV_F32:
                page_scores(reinterpret_cast<const float*>(page), nullptr, dim, group, query, dim, at, stride);
                break;
            case KV_BF16:
                page_scores(reinterpret_cast<const bf16*>(page), nullptr, dim, group, query, dim, at, stride);
                break;
            default: {
                const auto* scale = reinterpret_cast<const float*>(page + 2 * shape.numbers());
                page_scores(reinterpret_cast<const int8_t*>(page), scale, dim, group, query, dim, at, stride);
            }
        }
    }
    for (int g = 0; g < group; ++g) softmax(scores + g * stride, length);
    for (int i = 0; i < group * dim; ++i) out[i] = 0.0f;
    for (int p = 0; p < pages; ++p) {
        const uint8_t* page = pools.head(shape, table[p], layer, head);
        const int tokens = p + 1 < pages ? PAGE : length - p * PAGE;
        const float* at = scores + p * PAGE;
        switch (table[p] >> FORMAT_SHIFT) {
            case KV_F32:
                page_values(reinterpret_cast<const float*>(page) + shape.numbers(), nullptr, dim, tokens, group, at,
                            stride, out, dim);
                break;
            case KV_BF16:
                page_values(reinterpret_cast<const bf16*>(page) + shape.numbers(), nullptr, dim, tokens, group, at,
                            stride, out, dim);
                break;
            default: {
                const auto* scale = reinterpret_cast<const float*>(page + 2 * shape.numbers()) + dim;
                page_values(reinterpret_cast<const int8_t*>(page) + shape.numbers(), scale, dim, tokens, group, at,
                            stride, out, dim);
            }
        }
        if (mass)
            for (int g = 0; g < group; ++g) mass[p] += sum(load(at + g * stride));
    }
}

}  // namespace anabranch
