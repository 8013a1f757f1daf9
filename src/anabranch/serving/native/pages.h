// Keys and values in pages of 16 tokens, and attention over them.
//
// A page holds, for each layer and key-value head, keys as [head_dim][16] (a register is one channel of all tokens:
// scores need no sum across lanes) and values as [16][head_dim]. Unless they are fp32, two neighbouring lines of these,
// channels of keys or tokens of values, lie number by number side by side: [head_dim / 2][16][2] and [8][head_dim][2].
// In int8 a line has a scale, kept in the lowest bits of some of its codes: an int8 page is half a bf16 one to the byte.
// In int4 a line has a bf16 scale and zero beside its codes (number = zero + scale * code), and of a byte the low half is
// the even line's. Scales are folded into what codes are multiplied with: no number is restored.
//
// A pool holds all pages of one layer and head, then those of the next: what is read of a chain lies together.
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
struct int8x2 {
    int8_t even, odd;
};
struct bf16x2 {
    bf16 even, odd;
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
    int32_t pages[FORMATS];

    Pools(uint8_t* const* pools, const int32_t* counts) {
        std::copy(pools, pools + FORMATS, data);
        std::copy(counts, counts + FORMATS, pages);
    }

    uint8_t* head(const PageShape& shape, int32_t page, int layer, int head) const {
        const auto format = format_of(page);
        const int64_t index = page & ((1 << FORMAT_SHIFT) - 1);
        const int64_t region = int64_t{layer} * shape.heads + head;
        return data[format] + (region * pages[format] + index) * shape.head_bytes(format);
    }
};

inline void write_token(float* keys, int slot, int dim, const float* key, const float* value) {
    float* values = keys + int64_t{PAGE} * dim;
    for (int d = 0; d < dim; ++d) keys[d * PAGE + slot] = key[d];
    for (int d = 0; d < dim; ++d) values[slot * dim + d] = value[d];
}

inline void write_token(bf16x2* keys, int slot, int dim, const float* key, const float* value) {
    bf16x2* values = keys + int64_t{PAGE} / 2 * dim + slot / 2 * dim;
    for (int d = 0; d < dim; d += 2) {
        narrow(&keys[d / 2 * PAGE + slot].even, key[d]);
        narrow(&keys[d / 2 * PAGE + slot].odd, key[d + 1]);
    }
    for (int d = 0; d < dim; ++d) narrow(slot % 2 ? &values[d].odd : &values[d].even, value[d]);
}

inline void write_token(Format format, uint8_t* page, int slot, int dim, const float* key, const float* value) {
    format == KV_F32 ? write_token(reinterpret_cast<float*>(page), slot, dim, key, value)
                     : write_token(reinterpret_cast<bf16x2*>(page), slot, dim, key, value);
}

// What the scale of an int8 line may be: steps of an eighth of an octave, for numbers up to 119,000. ONE: the place of 1.
constexpr int ONE = 176;
inline const std::array<float, 256> SCALES = [] {
    std::array<float, 256> made;
    for (int i = 0; i < 256; ++i) made[i] = std::ldexp(std::exp2(i % 8 / 8.0f), i / 8 - ONE / 8);
    return made;
}();

// Where the scales of neighbouring int8 lines are in SCALES, a byte each, of a block of so many lines: bit b of line i's
// place is the lowest bit of the block's code b * lines + i.
template <class Bytes>
inline Bytes places_of(const uint8_t* codes, int lines) {
    Bytes places{};
    for (int b = 7; b >= 0; --b) {
        Bytes at;
        std::memcpy(&at, codes + b * lines, sizeof at);
        places = (places + places) | (at & 1);
    }
    return places;
}

inline f32x16 scales_at(u8x16 places) {
#ifdef __AVX512F__
    const __m512i place = _mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(places));
    // Of a place the lower four bits are one of two octaves from 1 on, the upper four twice as many octaves.
    const __m512 low = _mm512_permutexvar_ps(place, _mm512_loadu_ps(&SCALES[ONE]));
    const __m512i octaves = _mm512_slli_epi32(_mm512_srli_epi32(place, 4), 1);
    const __m512i exponent = _mm512_slli_epi32(_mm512_sub_epi32(octaves, _mm512_set1_epi32(ONE / 8)), 23);
    return reinterpret_cast<f32x16>(_mm512_add_epi32(_mm512_castps_si512(low), exponent));
#else
    f32x16 scales;
    for (int i = 0; i < LANES; ++i) scales[i] = SCALES[places[i]];
    return scales;
#endif
}

// Of a block of lines, a multiple of 16.
inline void scales_of(const int8x2* block, int lines, float* scales) {
    const auto* codes = reinterpret_cast<const uint8_t*>(block);
    constexpr int MANY = 4 * LANES;
    int i = 0;
    for (; i + MANY <= lines; i += MANY) {
        const auto places = places_of<u8x64>(codes + i, lines);
        u8x16 some[4];
        std::memcpy(some, &places, sizeof some);
        for (int j = 0; j < 4; ++j) store(scales + i + j * LANES, scales_at(some[j]));
    }
    for (; i < lines; i += LANES) store(scales + i, scales_at(places_of<u8x16>(codes + i, lines)));
}

// Asks for the lines that so many bytes at `ahead` are in. Pages lie anywhere in memory, where the processor guesses
// nothing: a later page is fetched line by line while this one is computed from. Asked for at once, lines would queue.
inline void fetch(const uint8_t* ahead, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at);
}

}  // namespace anabranch
