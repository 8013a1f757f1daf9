// Products with few rows. A weight matrix is packed in blocks of 64 outputs; within a block, step by step along the
// inputs, 64 neighbours lie side by side, so that a product streams the block once, from its beginning to its end.
// Every output is summed along the inputs in one fixed order, whatever the number of rows: a row's result does not
// depend on the batch it is in.
#pragma once
#include <type_traits>
#include <vector>

#include "vector.h"

namespace anabranch {

constexpr int BLOCK = 64;             // outputs of a block
constexpr int QUADS = BLOCK / LANES;  // registers of a block
#ifdef __AVX512F__
constexpr int TILE = 6;  // rows at once: 6 x 4 sums and 4 weights fit 32 registers
#else
constexpr int TILE = 2;
#endif

template <int M>
using Sums = f32x16[M][QUADS];

// fp32: weights[input][64].
struct F32 {
    using Act = float;

    static int64_t block_bytes(int inputs) { return int64_t{BLOCK} * inputs * 4; }

    template <int M>
    static void multiply(const uint8_t* block, int inputs, const float* const* rows, Sums<M>& sums) {
        const float* weights = reinterpret_cast<const float*>(block);
        for (int i = 0; i < inputs; ++i, weights += BLOCK) {
            f32x16 w[QUADS];
            for (int j = 0; j < QUADS; ++j) w[j] = load(weights + j * LANES);
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < QUADS; ++j) sums[m][j] += w[j] * rows[m][i];
        }
    }
};

// bf16: weights[input / 2][64][2], products of pairs summed in fp32.
struct BF16 {
    using Act = bf16;

    static int64_t block_bytes(int inputs) { return int64_t{BLOCK} * inputs * 2; }

    template <int M>
    static void multiply(const uint8_t* block, int inputs, const bf16* const* rows, Sums<M>& sums) {
        const bf16* weights = reinterpret_cast<const bf16*>(block);
        for (int i = 0; i < inputs; i += 2, weights += 2 * BLOCK) {
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
            for (int j = 0; j < QUADS; ++j) {
                u32x16 both;
                std::memcpy(&both, weights + 2 * j * LANES, sizeof both);
                const auto even = reinterpret_cast<f32x16>(both << 16);
                const auto odd = reinterpret_cast<f32x16>(both & 0xffff0000u);
                for (int m = 0; m < M; ++m)
                    sums[m][j] += even * widen(rows[m][i]) + odd * widen(rows[m][i + 1]);
            }
#endif
        }
    }
};

// int8: scale[64] in fp32, then weights in BF16's order. A block is widened once, beside the caches that hold it, and
// multiplied as bf16, which holds these integers exactly.
struct INT8 {
    using Act = bf16;

    static int64_t block_bytes(int inputs) { return BLOCK * int64_t{4} + int64_t{BLOCK} * inputs; }

    static void widen(const uint8_t* block, int inputs, bf16* to) {
        const int8_t* from = reinterpret_cast<const int8_t*>(block) + BLOCK * 4;
        for (int64_t i = 0; i < int64_t{BLOCK} * inputs; i += 2 * LANES) {
#ifdef __AVX512BF16__
            const auto pair = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(from + i + LANES)),
                                                  reinterpret_cast<__m512>(load(from + i)));
            _mm512_storeu_si512(to + i, reinterpret_cast<__m512i>(pair));
#else
            store(to + i, load(from + i));
            store(to + i + LANES, load(from + i + LANES));
#endif
        }
    }
};

// A block with rows [first, first + M); done(row, sums of its 64 outputs) is called once a row.
template <class Kind, int M, class Done>
inline void tile(const uint8_t* block, int inputs, const typename Kind::Act* const* rows, int first,
                 const Done& done) {
    Sums<M> sums = {};
    Kind::template multiply<M>(block, inputs, rows + first, sums);
    for (int m = 0; m < M; ++m) done(first + m, sums[m]);
}

template <class Kind, class Done>
inline void tiles(const uint8_t* block, int inputs, const typename Kind::Act* const* rows, int count,
                  const Done& done) {
    for (int first = 0; first < count;) {
        const int left = count - first;
        const int tiles = (left + TILE - 1) / TILE;
        const int take = (left + tiles - 1) / tiles;
        switch (take) {
            case 1: tile<Kind, 1>(block, inputs, rows, first, done); break;
            case 2: tile<Kind, 2>(block, inputs, rows, first, done); break;
#ifdef __AVX512F__
            case 3: tile<Kind, 3>(block, inputs, rows, first, done); break;
            case 4: tile<Kind, 4>(block, inputs, rows, first, done); break;
            case 5: tile<Kind, 5>(block, inputs, rows, first, done); break;
            case 6: tile<Kind, 6>(block, inputs, rows, first, done); break;
#endif
        }
        first += take;
    }
}

// Block `b` of a matrix with `count` rows. wide: room for a block as its kind widens it.
template <class Kind, class Done>
inline void multiply_block(const uint8_t* matrix, int64_t b, int inputs, const typename Kind::Act* const* rows,
                           int count, std::vector<bf16>& wide, const Done& done) {
    const uint8_t* block = matrix + b * Kind::block_bytes(inputs);
    if constexpr (std::is_same_v<Kind, INT8>) {
        wide.resize(size_t{BLOCK} * inputs);
        INT8::widen(block, inputs, wide.data());
        f32x16 scale[QUADS], scaled[QUADS];
        for (int j = 0; j < QUADS; ++j) scale[j] = load(reinterpret_cast<const float*>(block) + j * LANES);
        tiles<BF16>(reinterpret_cast<const uint8_t*>(wide.data()), inputs, rows, count,
                    [&](int row, const f32x16* sums) {
                        for (int j = 0; j < QUADS; ++j) scaled[j] = sums[j] * scale[j];
                        done(row, scaled);
                    });
    } else {
        tiles<Kind>(block, inputs, rows, count, done);
    }
}

}  // namespace anabranch
