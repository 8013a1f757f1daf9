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

// What the scale of an int8 line may be: steps of an eighth of an octave, for numbers up to 119,000. ONE: the place of 1.
constexpr int ONE = 176;
inline const std::array<float, 256> SCALES = [] {
    std::array<float, 256> made;
    for (int i = 0; i < 256; ++i) made[i] = std::ldexp(std::exp2(i % 8 / 8.0f), i / 8 - ONE / 8);
    return made;
}();

// Of an int8 line: bit i of the scale's place in SCALES is the lowest bit of code i. The product moves them together.
inline float scale_of(const int8_t* line) {
    uint64_t codes;
    std::memcpy(&codes, line, sizeof codes);
    return SCALES[(codes & 0x0101010101010101) * 0x0102040810204080 >> 56];
}

// Of the 16 lines from `lines` on, which are `stride` apart.
inline f32x16 scales_of(const int8_t* lines, int stride) {
#ifdef __AVX512BW__
    if (stride == LANES) {  // a key's: four lines a register
        alignas(32) uint64_t places[4];
        for (int i = 0; i < 4; ++i)
            places[i] = _mm512_test_epi8_mask(_mm512_loadu_si512(lines + 64 * i), _mm512_set1_epi8(1));
        const __m512i whole = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(places)));
        const __m512i place = _mm512_and_si512(whole, _mm512_set1_epi32(255));
        // Of a place the lower four bits are one of two octaves from 1 on, the upper four twice as many octaves.
        const __m512 low = _mm512_permutexvar_ps(place, _mm512_loadu_ps(&SCALES[ONE]));
        const __m512i octaves = _mm512_slli_epi32(_mm512_srli_epi32(place, 4), 1);
        const __m512i exponent = _mm512_slli_epi32(_mm512_sub_epi32(octaves, _mm512_set1_epi32(ONE / 8)), 23);
        return reinterpret_cast<f32x16>(_mm512_add_epi32(_mm512_castps_si512(low), exponent));
    }
#endif
    float scales[LANES];
    for (int i = 0; i < LANES; ++i) scales[i] = scale_of(lines + int64_t{i} * stride);
    return load(scales);
}

// Asks for the lines that so many bytes at `ahead` are in. Pages lie anywhere in memory, where the processor guesses
// nothing: a later page is fetched line by line while this one is computed from. Asked for at once, lines would queue.
inline void fetch(const uint8_t* ahead, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at);
}

}  // namespace anabranch
