// Products with few rows. A weight matrix is packed in blocks of 32 outputs; within a block, step by step along the
// inputs, 32 neighbours lie side by side, so that a product streams the block once, from its beginning to its end. The
// narrower a block, the more rows are computed while it comes from memory.
// Every output is summed along the inputs in one fixed order, whatever the number of rows: a row's result does not
// depend on the batch it is in.
#pragma once
#include <cmath>
#include <cstring>

#include "vector.h"

namespace anabranch {

constexpr int BLOCK = 32;             // outputs of a block
constexpr int QUADS = BLOCK / LANES;  // registers of a block
constexpr int STEP = 4 * BLOCK;       // bytes of a block that a step of a product reads, of any kind
#ifdef __AVX512F__
constexpr int TILE = 12;  // rows at once: 12 x 2 sums and 2 weights fit 32 registers
#else
constexpr int TILE = 3;
#endif

template <int M>
using Tile = f32x16[M][QUADS];

// What memory is asked for while a tile is computed: at each step the lines at `at`, which moves on by `bytes`, and from
// `end` to `next`.
struct Ahead {
    const uint8_t *at, *end, *next;
    int bytes;

    void step() {
        for (int line = 0; line < STEP; line += 64) __builtin_prefetch(at + line);
        at += bytes;
        if (at == end) at = next;
    }
};

// fp32: weights[input][32].
struct F32 {
    using Act = float;
    static constexpr int ROWS = TILE;  // at once

    static int64_t row_acts(int numbers) { return numbers; }
    static void write(float* row, int at, const float* x, int n) { std::memcpy(row + at, x, n * sizeof(float)); }

    static int64_t block_bytes(int inputs) { return int64_t{BLOCK} * inputs * 4; }

    template <int M>
    static void multiply(const uint8_t* block, int inputs, const float* const* rows, Tile<M>& sums, Ahead ahead) {
        const float* weights = reinterpret_cast<const float*>(block);
        for (int i = 0; i < inputs; ++i, weights += BLOCK) {
            ahead.step();
            f32x16 w[QUADS];
            for (int j = 0; j < QUADS; ++j) w[j] = load(weights + j * LANES);
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < QUADS; ++j) sums[m][j] += w[j] * rows[m][i];
        }
    }
};

// bf16: weights[input / 2][32][2], products of pairs summed in fp32. Without instructions for them, rows are rounded to
// bf16 and kept as fp32, so that weights alone have to be widened.
struct BF16 {
#ifdef __AVX512BF16__
    using Act = bf16;
#else
    using Act = float;
#endif
    static constexpr int ROWS = TILE;

    static int64_t row_acts(int numbers) { return numbers; }
    static void write(Act* row, int at, const float* x, int n) {
#ifdef __AVX512BF16__
        int d = 0;
        for (; d + LANES <= n; d += LANES) store(row + at + d, load(x + d));
        for (; d < n; ++d) narrow(row + at + d, x[d]);
#else
        for (int d = 0; d < n; ++d) {
            bf16 half;
            narrow(&half, x[d]);
            row[at + d] = widen(half);
        }
#endif
    }

    static int64_t block_bytes(int inputs) { return int64_t{BLOCK} * inputs * 2; }

    template <int M>
    static void multiply(const uint8_t* block, int inputs, const Act* const* rows, Tile<M>& sums, Ahead ahead) {
        const bf16* weights = reinterpret_cast<const bf16*>(block);
        for (int i = 0; i < inputs; i += 2, weights += 2 * BLOCK) {
            ahead.step();
#ifdef __AVX512BF16__
            __m512bh w[QUADS];
            for (int j = 0; j < QUADS; ++j)
                w[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + 2 * j * LANES));
            for (int m = 0; m < M; ++m) {
                int32_t pair;
                std::memcpy(&pair, rows[m] + i, sizeof pair);
                const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
                for (int j = 0; j < QUADS; ++j)
                    sums[m][j] = reinterpret_cast<f32x16>(
                        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[m][j]), w[j], x));
            }
#else
            // One input after the other: weights of both at once would not fit the registers.
            for (int odd = 0; odd < 2; ++odd) {
                f32x16 w[QUADS];
                for (int j = 0; j < QUADS; ++j) {
                    u32x16 both;
                    std::memcpy(&both, weights + 2 * j * LANES, sizeof both);
                    w[j] = reinterpret_cast<f32x16>(odd ? both & 0xffff0000u : both << 16);
                }
                for (int m = 0; m < M; ++m)
                    for (int j = 0; j < QUADS; ++j) sums[m][j] += w[j] * rows[m][i + odd];
            }
#endif
        }
    }
};

// int8: scale[32] in fp32, then weights[input / 4][32][4], kept unsigned with 128 for zero. A row is quantised in groups
// of 32 neighbours with a scale each: 32 numbers, the scale, and -128 times their sum, which takes the 128 out of the
// integer sums. Sums of a group are exact; groups are added in fp32 in their order.
struct INT8 {
    using Act = uint8_t;
    static constexpr int GROUP = 32, STRIDE = GROUP + 8;
    static constexpr int ROWS = TILE < 8 ? TILE : 8;  // their sums as integers take registers too

    static int64_t block_bytes(int inputs) { return BLOCK * int64_t{4} + int64_t{BLOCK} * inputs; }
    static int64_t row_acts(int numbers) { return int64_t{numbers} / GROUP * STRIDE; }

    // `at` and `n` are whole groups.
    static void write(uint8_t* row, int at, const float* x, int n) {
        for (int d = 0; d < n; d += GROUP) {
            uint8_t* to = row + (at + d) / GROUP * STRIDE;
            const f32x16 low = load(x + d), high = load(x + d + LANES);
            const float most = largest(larger(larger(low, -low), larger(high, -high)));
            const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
            const i32x16 first = rounded(low * inverse), second = rounded(high * inverse);
            store_bytes(to, first);
            store_bytes(to + LANES, second);
            const int32_t total = -128 * sum(first + second);
            std::memcpy(to + GROUP, &scale, 4);
            std::memcpy(to + GROUP + 4, &total, 4);
        }
    }

    template <int M>
    static void multiply(const uint8_t* block, int inputs, const uint8_t* const* rows, Tile<M>& sums, Ahead ahead) {
        const uint8_t* weights = block + BLOCK * 4;
        for (int g = 0; g < inputs / GROUP; ++g) {
            i32x16 whole[M][QUADS];
            for (int m = 0; m < M; ++m) {
                int32_t offset;
                std::memcpy(&offset, rows[m] + g * STRIDE + GROUP + 4, 4);
                for (int j = 0; j < QUADS; ++j) whole[m][j] = i32x16{} + offset;
            }
            for (int i = 0; i < GROUP; i += 4, weights += 4 * BLOCK) {
                ahead.step();
                add_products<M>(weights, rows, g * STRIDE + i, whole);
            }
            for (int m = 0; m < M; ++m) {
                float scale;
                std::memcpy(&scale, rows[m] + g * STRIDE + GROUP, 4);
                for (int j = 0; j < QUADS; ++j) sums[m][j] += __builtin_convertvector(whole[m][j], f32x16) * scale;
            }
        }
        for (int j = 0; j < QUADS; ++j) {
            const f32x16 scale = load(reinterpret_cast<const float*>(block) + j * LANES);
            for (int m = 0; m < M; ++m) sums[m][j] *= scale;
        }
    }

    // Four inputs, at `at` in each row, with 32 outputs.
    template <int M>
    static void add_products(const uint8_t* weights, const uint8_t* const* rows, int at, i32x16 (*whole)[QUADS]) {
#ifdef __AVX512VNNI__
        __m512i w[QUADS];
        for (int j = 0; j < QUADS; ++j) w[j] = _mm512_loadu_si512(weights + j * 4 * LANES);
        for (int m = 0; m < M; ++m) {
            int32_t four;
            std::memcpy(&four, rows[m] + at, 4);
            const __m512i x = _mm512_set1_epi32(four);
            for (int j = 0; j < QUADS; ++j)
                whole[m][j] = reinterpret_cast<i32x16>(
                    _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(whole[m][j]), w[j], x));
        }
#else
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < QUADS; ++j)
                for (int lane = 0; lane < LANES; ++lane)
                    for (int i = 0; i < 4; ++i)
                        whole[m][j][lane] +=
                            weights[(j * LANES + lane) * 4 + i] * static_cast<int8_t>(rows[m][at + i]);
#endif
    }
};

// The sums of M rows. Of each kind and M there is one, whoever calls it: they are most of what is compiled.
template <class Kind, int M>
__attribute__((noinline)) void tile(const uint8_t* block, int inputs, const typename Kind::Act* const* rows,
                                    f32x16 (*sums)[QUADS], Ahead ahead) {
    Tile<M> kept = {};
    Kind::template multiply<M>(block, inputs, rows, kept, ahead);
    std::memcpy(sums, kept, sizeof kept);
}

// A block with `count` rows; done(row, sums of its 32 outputs) is called once a row. The first tile streams the block
// from memory, each of the others fetches a part of `next`, the block that is computed after it; null where unknown.
template <class Kind, class Done>
inline void multiply_block(const uint8_t* block, const uint8_t* next, int inputs, const typename Kind::Act* const* rows,
                           int count, const Done& done) {
    constexpr int NEAR = 8192;  // bytes: the processor's own prefetching does not cross pages of memory
    const int64_t bytes = Kind::block_bytes(inputs);
    const int others = (count + Kind::ROWS - 1) / Kind::ROWS - 1;
    if (!next) next = block;
    Ahead ahead{block + NEAR, block + bytes, next, STEP};
    for (int first = 0; first < count;) {
        const int left = count - first;
        const int tiles = (left + Kind::ROWS - 1) / Kind::ROWS;
        const int take = (left + tiles - 1) / tiles;
        if (first) ahead = {next + (others - tiles) * bytes / others, nullptr, next, STEP / others};
        Tile<TILE> sums;
        switch (take) {
            case 1: tile<Kind, 1>(block, inputs, rows + first, sums, ahead); break;
            case 2: tile<Kind, 2>(block, inputs, rows + first, sums, ahead); break;
            case 3: tile<Kind, 3>(block, inputs, rows + first, sums, ahead); break;
#ifdef __AVX512F__
            case 4: tile<Kind, 4>(block, inputs, rows + first, sums, ahead); break;
            case 5: tile<Kind, 5>(block, inputs, rows + first, sums, ahead); break;
            case 6: tile<Kind, 6>(block, inputs, rows + first, sums, ahead); break;
            case 7: tile<Kind, 7>(block, inputs, rows + first, sums, ahead); break;
            case 8: tile<Kind, 8>(block, inputs, rows + first, sums, ahead); break;
            case 9: tile<Kind, 9>(block, inputs, rows + first, sums, ahead); break;
            case 10: tile<Kind, 10>(block, inputs, rows + first, sums, ahead); break;
            case 11: tile<Kind, 11>(block, inputs, rows + first, sums, ahead); break;
            case 12: tile<Kind, 12>(block, inputs, rows + first, sums, ahead); break;
#endif
        }
        for (int m = 0; m < take; ++m) done(first + m, sums[m]);
        first += take;
    }
}

// Sums of block b become a part of a row, or are added to it.
inline void keep(float* row, const float* bias, int b, const f32x16* sums) {
    for (int j = 0; j < QUADS; ++j) {
        const int at = b * BLOCK + j * LANES;
        store(row + at, bias ? sums[j] + load(bias + at) : sums[j]);
    }
}

inline void add(float* row, const float* bias, int b, const f32x16* sums, float weight) {
    for (int j = 0; j < QUADS; ++j) {
        const int at = b * BLOCK + j * LANES;
        store(row + at, load(row + at) + (bias ? sums[j] + load(bias + at) : sums[j] * weight));
    }
}

}  // namespace anabranch
