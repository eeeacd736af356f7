// Vectors as wide as the instruction set that this file is compiled for, and what the kernels need on them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace segnext {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using VectorN = typename VectorOf<T, N>::type;

template <class A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <class A>
using Vector = VectorN<A, kLanes<A>>;
template <class A>
using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
using BitsVector = VectorN<Bits<A>, kLanes<A>>;

#if defined(__SANITIZE_ADDRESS__)
#define SEGNEXT_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#define SEGNEXT_ADDRESS_SANITIZER __has_feature(address_sanitizer)  // Clang's way to tell
#else
#define SEGNEXT_ADDRESS_SANITIZER 0
#endif

#define SEGNEXT_INLINE inline __attribute__((always_inline))
#define SEGNEXT_UNROLL _Pragma("GCC unroll 64")
// For a loop whose sums fill the registers: inlined beside others, GCC keeps some of them on the stack.
#define SEGNEXT_NOINLINE __attribute__((noinline))

template <class A>
SEGNEXT_INLINE Vector<A> load(const A* p) {
  Vector<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
SEGNEXT_INLINE void store(A* p, Vector<A> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class To, class From>
SEGNEXT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A>
SEGNEXT_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// Storage types of two bytes; arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What __builtin_convertvector does, for which GCC splits and joins vectors.
template <int N>
SEGNEXT_INLINE VectorN<uint32_t, N> zero_extend(VectorN<uint16_t, N> bits) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<VectorN<uint32_t, N>>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  if constexpr (N == 8) return bit_cast<VectorN<uint32_t, N>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#endif
  return __builtin_convertvector(bits, VectorN<uint32_t, N>);
}

template <int N>
SEGNEXT_INLINE VectorN<float, N> widen(VectorN<uint16_t, N> bits, BFloat16) {
  return bit_cast<VectorN<float, N>>(zero_extend<N>(bits) << 16);
}

SEGNEXT_INLINE float widen(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// The elements of two vectors in pairs, as they lie in memory: even[0], odd[0], even[1], ...
template <int N>
SEGNEXT_INLINE VectorN<uint32_t, N> pair(VectorN<uint16_t, N> even, VectorN<uint16_t, N> odd) {
  return zero_extend<N>(even) | zero_extend<N>(odd) << 16;
}

template <int N>
SEGNEXT_INLINE VectorN<uint16_t, N> narrow(VectorN<float, N> v, BFloat16) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) {  // unlike the portable twin this takes subnormals, below 1.2e-38, as zero
    auto packed = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
    return bit_cast<VectorN<uint16_t, N>>(packed);
  }
#endif
  auto bits = bit_cast<VectorN<uint32_t, N>>(v);
  auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  auto quiet = bits >> 16 | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, VectorN<uint16_t, N>);
}

template <int N>
SEGNEXT_INLINE VectorN<float, N> widen(VectorN<uint16_t, N> half, Half) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    auto wide = _mm512_cvtph_ps(bit_cast<__m256i>(half));
    return bit_cast<VectorN<float, N>>(wide);
  }
#elif defined(__F16C__)
  if constexpr (N == 8) {
    auto wide = _mm256_cvtph_ps(bit_cast<__m128i>(half));
    return bit_cast<VectorN<float, N>>(wide);
  }
#endif
  auto bits = __builtin_convertvector(half, VectorN<uint32_t, N>);
  auto magnitude = bits & 0x7fff;
  auto shifted = magnitude << 13;  // exponent and fraction in float's places, the exponent 112 too small
  // A half below the normal ones is so many units of 2^-24, which 0.5 has room for; a float below the normal ones in between
  // would be zero where the processor flushes these (torch.set_flush_denormal).
  auto units = bit_cast<VectorN<float, N>>(magnitude | 0x3f000000u) - 0.5f;
  auto finite = magnitude < 0x400 ? bit_cast<VectorN<uint32_t, N>>(units) : shifted + 0x38000000u;
  auto special = shifted | 0x7f800000u;
  auto result = (magnitude >= 0x7c00 ? special : finite) | (bits & 0x8000) << 16;
  return bit_cast<VectorN<float, N>>(result);
}

template <int N>
SEGNEXT_INLINE VectorN<uint16_t, N> narrow(VectorN<float, N> v, Half) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    auto packed = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    return bit_cast<VectorN<uint16_t, N>>(packed);
  }
#elif defined(__F16C__)
  if constexpr (N == 8) {
    auto packed = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    return bit_cast<VectorN<uint16_t, N>>(packed);
  }
#endif
  typedef VectorN<uint32_t, N> U;
  typedef VectorN<float, N> F;
  auto bits = bit_cast<U>(v);
  U magnitude = bits & 0x7fffffffu;
  U normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;  // to nearest, ties to even
  F shifted = bit_cast<F>(magnitude) + 0.5f;  // adding 0.5 rounds a subnormal to units of 2^-24
  U subnormal = bit_cast<U>(shifted) - 0x3f000000u;
  U finite = magnitude < 0x38800000u ? subnormal : normal;
  U large = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  U result = (magnitude >= 0x477ff000u ? large : finite) | (bits >> 16 & 0x8000);
  return __builtin_convertvector(result, VectorN<uint16_t, N>);
}

// kLanes<A> elements of storage type T, as accumulators.
template <class A, class T>
SEGNEXT_INLINE Vector<A> load_as(const T* p) {
  if constexpr (std::is_same_v<A, T>) {
    return load<A>(p);
  } else {
    VectorN<uint16_t, kLanes<A>> bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen<kLanes<A>>(bits, T{});
  }
}

template <class A, class T>
SEGNEXT_INLINE void store_as(T* p, Vector<A> v) {
  if constexpr (std::is_same_v<A, T>) {
    store<A>(p, v);
  } else {
    auto bits = narrow<kLanes<A>>(v, T{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

// The first `count` of kLanes<A> elements; the others load as zero and are not stored.
template <class A, class T>
SEGNEXT_INLINE Vector<A> load_some(const T* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    auto v = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
    return bit_cast<Vector<A>>(v);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return bit_cast<Vector<A>>(_mm256_maskload_ps(p, wanted));
  }
#endif
  T lanes[kLanes<A>] = {};
  std::memcpy(lanes, p, sizeof(T) * count);
  return load_as<A>(lanes);
}

template <class A, class T>
SEGNEXT_INLINE void store_some(T* p, Vector<A> v, int count) {
  T lanes[kLanes<A>];
  store_as<A>(lanes, v);
  std::memcpy(p, lanes, sizeof(T) * count);
}

// As the above for a count that may be all.
template <class A = float, class T>
SEGNEXT_INLINE Vector<A> load_lanes(const T* p, int count) {
  return count == kLanes<A> ? load_as<A>(p) : load_some<A>(p, count);
}

template <class A = float, class T>
SEGNEXT_INLINE void store_lanes(T* p, Vector<A> v, int count) {
  count == kLanes<A> ? store_as<A>(p, v) : store_some<A>(p, v, count);
}

template <class A, int... I>
SEGNEXT_INLINE std::pair<Vector<A>, Vector<A>> interleave(Vector<A> a, Vector<A> b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<A>;
#if defined(__clang__)
  return {__builtin_shufflevector(a, b, (I % 2 * n + I / 2)...), __builtin_shufflevector(a, b, (I % 2 * n + (I + n) / 2)...)};
#else
  return {__builtin_shuffle(a, b, BitsVector<A>{(I % 2 * n + I / 2)...}),
          __builtin_shuffle(a, b, BitsVector<A>{(I % 2 * n + (I + n) / 2)...})};
#endif
}

// Rows become columns: log2(n) rounds, each of which interleaves the first half of the rows with the second.
template <class A>
SEGNEXT_INLINE void transpose(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
  SEGNEXT_UNROLL
  for (int round = 1; round < n; round *= 2) {
    Vector<A> next[n];
    SEGNEXT_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      auto [low, high] = interleave<A>(rows[i], rows[i + n / 2], std::make_integer_sequence<int, n>{});
      next[2 * i] = low;
      next[2 * i + 1] = high;
    }
    SEGNEXT_UNROLL
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// `most` where z is NaN.
SEGNEXT_INLINE Vector<float> minimum(Vector<float> z, float most) {
#if defined(__AVX512F__)
  return bit_cast<Vector<float>>(_mm512_min_ps(bit_cast<__m512>(z), _mm512_set1_ps(most)));
#else
  return z < most ? z : broadcast(most);
#endif
}

// z within [-end, end]; NaN stays.
SEGNEXT_INLINE Vector<float> clamp(Vector<float> z, float end) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_max_ps(_mm512_set1_ps(-end), bit_cast<__m512>(z));  // the second operand where one is NaN
  return bit_cast<Vector<float>>(_mm512_min_ps(_mm512_set1_ps(end), low));
#elif defined(__AVX2__)
  const __m256 low = _mm256_max_ps(_mm256_set1_ps(-end), bit_cast<__m256>(z));
  return bit_cast<Vector<float>>(_mm256_min_ps(_mm256_set1_ps(end), low));
#else
  z = z < -end ? broadcast(-end) : z;
  return z > end ? broadcast(end) : z;
#endif
}

// exp(x) for x <= 0, to 3 units in the last place, through the subnormals down to 0.
SEGNEXT_INLINE Vector<float> exp_negative(Vector<float> x) {
  typedef Vector<float> V;
  typedef BitsVector<float> I;
  x = x < -104.0f ? broadcast(-104.0f) : x;
  const V shifted = x * 1.44269504f + 0x1.8p23f;  // the integer nearest to x / ln 2 lands in the low bits
  const V n = shifted - 0x1.8p23f;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  V p =
      1.0f + r * (1.0f + r * (0.5f + r * (0x1.555556p-3f + r * (0x1.555556p-5f + r * (0x1.111112p-7f + r * 0x1.6c16c2p-10f)))));
  const I exponent = bit_cast<I>(shifted) - 0x4b400000;
  const I half = exponent >> 1;  // 2^exponent in two factors, as the whole may be subnormal
  return p * bit_cast<V>((half + 127) << 23) * bit_cast<V>((exponent - half + 127) << 23);
}

SEGNEXT_INLINE Vector<double> exp_negative(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace segnext
