// Sixteen floats at a time, in GCC's vector extensions: one register with AVX-512, two with AVX2, four with SSE.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace anabranch {

constexpr int LANES = 16;
using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using i16x16 = int16_t __attribute__((vector_size(32)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using u8x16 = uint8_t __attribute__((vector_size(16)));
using u8x64 = uint8_t __attribute__((vector_size(64)));

// The upper half of a float, as bfloat16 stores it. A type of its own: uint16_t would convert by value.
struct bf16 {
    uint16_t bits;
};

// A vector that begins with a cache line: a register that is written across two comes back late.
template <class T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};

    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

inline f32x16 splat(float value) { return f32x16{} + value; }

inline f32x16 load(const float* p) {
    f32x16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32x16 load(const bf16* p) {
#ifdef __AVX512F__  // GCC 12 widens a vector of halves in two parts, and bytes one by one
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<f32x16>(_mm512_slli_epi32(wide, 16));
#else
    u16x16 half;
    std::memcpy(&half, p, sizeof half);
    return reinterpret_cast<f32x16>(__builtin_convertvector(half, u32x16) << 16);
#endif
}

// The low and the high halves of 16 bytes.
inline void split(const uint8_t* p, f32x16& low, f32x16& high) {
#ifdef __AVX512F__
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = reinterpret_cast<f32x16>(_mm512_cvtepi32_ps(_mm512_and_epi32(both, _mm512_set1_epi32(15))));
    high = reinterpret_cast<f32x16>(_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4)));
#else
    u8x16 bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const auto both = __builtin_convertvector(bytes, i32x16);
    low = __builtin_convertvector(both & 15, f32x16);
    high = __builtin_convertvector(both >> 4, f32x16);
#endif
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest even, as torch does; NaN stays NaN through the carry-free path of finite values.
inline void store(bf16* p, f32x16 v) {
    u32x16 bits = reinterpret_cast<u32x16>(v);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#ifdef __AVX512F__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
    u16x16 half = __builtin_convertvector(bits, u16x16);
    std::memcpy(p, &half, sizeof half);
#endif
}

// The low byte of each.
inline void store_bytes(uint8_t* p, i32x16 v) {
#ifdef __AVX512F__
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}

// To the nearest whole number, of numbers below 2^22.
inline i32x16 rounded(f32x16 v) {
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    return reinterpret_cast<i32x16>(v + magic) - reinterpret_cast<i32x16>(magic);
}

inline int32_t sum(i32x16 v) {
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

inline float widen(float v) { return v; }
inline float widen(bf16 v) {
    uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float* p, float v) { *p = v; }
inline void narrow(bf16* p, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    p->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A fixed order of additions, so that a sum does not depend on what else is computed.
inline float sum(f32x16 v) {
#ifdef __AVX512F__  // the same additions, in registers
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
    float lane[LANES];
    store(lane, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
#endif
}

inline float largest(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float lane[LANES];
    store(lane, v);
    float most = lane[0];
    for (int i = 1; i < LANES; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
#endif
}

inline bool any_above(f32x16 v, float limit) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_set1_ps(limit), _CMP_GT_OQ);
#else
    return largest(v) > limit;
#endif
}

inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Where the largest of n numbers is, the first of equals.
inline int place_of_largest(const float* x, int n) {
    f32x16 most = splat(-INFINITY);
    i32x16 here, place{};
    for (int i = 0; i < LANES; ++i) here[i] = i;
    int i = 0;
    for (; i + LANES <= n; i += LANES, here += LANES) {
        const f32x16 value = load(x + i);
        place = value > most ? here : place;
        most = larger(value, most);
    }
    int best = 0;
    float top = -INFINITY;
    for (int lane = 0; lane < LANES; ++lane)
        if (most[lane] > top || (most[lane] == top && place[lane] < best)) top = most[lane], best = place[lane];
    for (; i < n; ++i)
        if (x[i] > top) top = x[i], best = i;
    return best;
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 7 in r (Taylor, error under 1 ulp there),
// and n added to the exponent. Below -87 it is e^-87, about 1e-38.
inline f32x16 exponential(f32x16 x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    f32x16 shifted = x * 1.44269504088896341f + magic;
    i32x16 n = reinterpret_cast<i32x16>(shifted) - reinterpret_cast<i32x16>(magic);
    f32x16 whole = shifted - magic;
    f32x16 r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    f32x16 p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return reinterpret_cast<f32x16>(reinterpret_cast<i32x16>(p) + (n << 23));
}

inline f32x16 silu(f32x16 x) { return x / (1.0f + exponential(-x)); }

}  // namespace anabranch
