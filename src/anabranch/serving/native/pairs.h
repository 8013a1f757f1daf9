// Numbers that lie in pages two by two: how pairs are taken apart, and products of pairs.
#pragma once
#include <type_traits>

#include "pages.h"

namespace anabranch {

template <class T>
constexpr bool PAIRED = !std::is_same_v<T, float>;

// Sixteen pairs.
inline void load_pairs(const int4x2* p, f32x16& even, f32x16& odd) { split(&p->bits, even, odd); }
inline void load_pairs(const bf16x2* p, f32x16& even, f32x16& odd) {
    u32x16 both;
    std::memcpy(&both, p, sizeof both);
    even = reinterpret_cast<f32x16>(both << 16);
    odd = reinterpret_cast<f32x16>(both & 0xffff0000u);
}

inline void load_pairs(const int8x2* p, f32x16& even, f32x16& odd) {
    i16x16 both;
    std::memcpy(&both, p, sizeof both);
    const auto wide = __builtin_convertvector(both, i32x16);
    even = __builtin_convertvector(wide << 24 >> 24, f32x16);
    odd = __builtin_convertvector(wide >> 8, f32x16);
}

// Channels d and d + 1 of all tokens of a page, and the bytes they take.
template <class T>
inline void load_channels(const T* keys, int d, f32x16& even, f32x16& odd) {
    if constexpr (PAIRED<T>) {
        load_pairs(keys + d / 2 * PAGE, even, odd);
    } else {
        even = load(keys + d * PAGE);
        odd = load(keys + (d + 1) * PAGE);
    }
}
template <class T>
constexpr int CHANNELS_BYTES = PAGE * sizeof(T) * (PAIRED<T> ? 1 : 2);

// Products of pairs, where the processor has them: of numbers as they lie in a page, and factors that are rounded to
// pairs in units of what `round` returns.
template <class T>
struct Products {
    static constexpr bool HAS = false;
};
#ifdef __AVX512BF16__
template <>
struct Products<bf16x2> {
    static constexpr bool HAS = true;
    using Sums = __m512;

    static f32x16 round(const float* x, int n, int32_t* pairs) {
        for (int i = 0; i < n; i += LANES) {
            const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(load(x + i)));
            std::memcpy(pairs + i / 2, &halves, sizeof halves);
        }
        return splat(1.0f);
    }
    static Sums add(Sums sums, const bf16x2* numbers, int32_t pair) {
        return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(_mm512_loadu_si512(numbers)),
                                reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
    }
    static f32x16 in_units(Sums sums, f32x16) { return reinterpret_cast<f32x16>(sums); }
};
#endif
#ifdef __AVX512VNNI__
// Factors of 16 bits, in units of a power of two. Sums over MAX_DIM codes fit 32 bits.
template <>
struct Products<int8x2> {
    static constexpr bool HAS = true;
    using Sums = __m512i;

    static f32x16 round(const float* x, int n, int32_t* pairs) {
        constexpr int WITHOUT_SIGNS = 0b1011;
        __m512 most = _mm512_setzero_ps();
        for (int i = 0; i < n; i += LANES) most = _mm512_range_ps(most, _mm512_loadu_ps(x + i), WITHOUT_SIGNS);
        // In all lanes, for a number that leaves its register comes back late.
        most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0b01001110));
        most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0b10110001));
        most = _mm512_max_ps(most, _mm512_permute_ps(most, 0b01001110));
        most = _mm512_max_ps(most, _mm512_permute_ps(most, 0b10110001));
        const __m512i exponent = _mm512_max_epi32(_mm512_srli_epi32(_mm512_castps_si512(most), 23), _mm512_set1_epi32(32));
        const auto power = [](__m512i of) { return _mm512_castsi512_ps(_mm512_slli_epi32(of, 23)); };
        const __m512 inverse = power(_mm512_sub_epi32(_mm512_set1_epi32(254 + 14), exponent));
        for (int i = 0; i < n; i += LANES) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + i / 2), _mm512_cvtsepi32_epi16(whole));
        }
        return reinterpret_cast<f32x16>(power(_mm512_sub_epi32(exponent, _mm512_set1_epi32(14))));
    }
    static Sums add(Sums sums, const int8x2* codes, int32_t pair) {
        const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        return _mm512_dpwssd_epi32(sums, wide, _mm512_set1_epi32(pair));
    }
    static f32x16 in_units(Sums sums, f32x16 unit) {
        return reinterpret_cast<f32x16>(_mm512_cvtepi32_ps(sums)) * unit;
    }
};
#endif

}  // namespace anabranch
