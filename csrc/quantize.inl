// The loops of group-wise quantisation and of signs with error feedback, once per instruction set; included by kernels.inl.
//
// The formats are those of deepspeed/kernels/reference, which these equal bit for bit: fp32, one rounding per operation.
// Magnitudes are compared as integers, which vectorises without -ffast-math and puts NaN above infinity; a sum with
// 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.

static constexpr uint32_t kInfinityBits = 0x7f800000;
static constexpr float kRounder = 12582912.0f;

static uint32_t magnitude(const float* __restrict x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Floats as integers of the same order: what is below zero is mirrored.
static inline int32_t ordered(float x) {
    const int32_t bits = static_cast<int32_t>(bits_of(x));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static void range(const float* __restrict x, size_t n, float* lowest, float* highest) {
    int32_t low = ordered(*lowest), high = ordered(*highest);
    for (size_t i = 0; i < n; ++i) {
        const int32_t value = ordered(x[i]);
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    *lowest = float_of(static_cast<uint32_t>(low ^ ((low >> 31) & 0x7fffffff)));
    *highest = float_of(static_cast<uint32_t>(high ^ ((high >> 31) & 0x7fffffff)));
}

// round((x - low) / scale), plus `offset`, in the low bits of the result. The quotient is within +-255.
static inline uint32_t to_grid(float x, float low, float scale, int offset) {
    return bits_of((x - low) / scale + kRounder) + static_cast<uint32_t>(offset);
}

static inline void rest_to_bytes(const float* x, uint8_t* q, size_t n, float low, float scale, int offset) {
    DS_INDEPENDENT
    for (size_t i = 0; i < n; ++i) q[i] = static_cast<uint8_t>(to_grid(x[i], low, scale, offset));
}

static inline void rest_to_nibbles(const float* x, uint8_t* q, size_t n, float low, float scale, int offset) {
    alignas(64) uint8_t whole[kBlock];
    rest_to_bytes(x, whole, n, low, scale, offset);
    for (size_t i = 0; i < n / 2; ++i) {
        uint16_t pair;
        std::memcpy(&pair, whole + 2 * i, sizeof pair);
        q[i] = static_cast<uint8_t>((pair & 0xf) | (pair >> 4));
    }
}

#ifdef DS_HAS_AVX2

// 16 elements on the grid, their low bytes as words of 16 bits: 0..3 and 8..11 in the low half, the others in the high one.
static inline __m256i grid_of_16(const float* x, __m256 low, __m256 scale, __m256i offset) {
    __m256i parts[2];
    for (int j = 0; j < 2; ++j) {
        const __m256 quotient = _mm256_div_ps(_mm256_sub_ps(_mm256_loadu_ps(x + 8 * j), low), scale);
        const __m256i rounded = _mm256_castps_si256(_mm256_add_ps(quotient, _mm256_set1_ps(kRounder)));
        parts[j] = _mm256_and_si256(_mm256_add_epi32(rounded, offset), _mm256_set1_epi32(0xff));
    }
    return _mm256_packus_epi32(parts[0], parts[1]);
}

// The low bytes of 32 elements on the grid, in order.
static inline __m256i grid_of_32(const float* x, __m256 low, __m256 scale, __m256i offset) {
    const __m256i bytes = _mm256_packus_epi16(grid_of_16(x, low, scale, offset), grid_of_16(x + 16, low, scale, offset));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static void to_bytes(const float* __restrict x, uint8_t* __restrict q, size_t n, float low, float scale, int offset) {
    const __m256 lows = _mm256_set1_ps(low), scales = _mm256_set1_ps(scale);
    const __m256i offsets = _mm256_set1_epi32(offset);
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), grid_of_32(x + i, lows, scales, offsets));
    rest_to_bytes(x + i, q + i, n - i, low, scale, offset);
}

// Two elements a byte, the even one in the low four bits; n is even.
static void to_nibbles(const float* __restrict x, uint8_t* __restrict q, size_t n, float low, float scale, int offset) {
    const __m256 lows = _mm256_set1_ps(low), scales = _mm256_set1_ps(scale);
    const __m256i offsets = _mm256_set1_epi32(offset), nibble = _mm256_set1_epi8(15), places = _mm256_set1_epi16(0x1001);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i whole = _mm256_and_si256(grid_of_32(x + i, lows, scales, offsets), nibble);
        const __m256i pairs = _mm256_maddubs_epi16(whole, places);  // the even one + 16 times the odd one
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i / 2), _mm256_castsi256_si128(packed));
    }
    rest_to_nibbles(x + i, q + i / 2, n - i, low, scale, offset);
}

#else

static void to_bytes(const float* __restrict x, uint8_t* __restrict q, size_t n, float low, float scale, int offset) {
    rest_to_bytes(x, q, n, low, scale, offset);
}

// Two elements a byte, the even one in the low four bits; n is even.
static void to_nibbles(const float* __restrict x, uint8_t* __restrict q, size_t n, float low, float scale, int offset) {
    rest_to_nibbles(x, q, n, low, scale, offset);
}

#endif

template <class Byte>
static void from_bytes(const uint8_t* __restrict q, float* __restrict x, size_t n, float low, float scale) {
    DS_INDEPENDENT
    for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<Byte>(q[i])) * scale + low;
}

static void from_nibbles(const uint8_t* __restrict q, float* __restrict x, size_t n, float low, float scale, int offset) {
    for (size_t i = 0; i < n / 2; ++i) {
        x[2 * i] = static_cast<float>((q[i] & 15) - offset) * scale + low;
        x[2 * i + 1] = static_cast<float>((q[i] >> 4) - offset) * scale + low;
    }
}

#ifdef DS_HAS_AVX2

static inline void add_wide(__m256 x, __m256d* lanes) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    lanes[0] = _mm256_add_pd(lanes[0], _mm256_mul_pd(low, low));
    lanes[1] = _mm256_add_pd(lanes[1], _mm256_mul_pd(high, high));
}

// The squares of x + error, in kNumLanes lanes. n is a multiple of 8.
static void square_sums(const float* __restrict x, const float* __restrict error, size_t n, double* __restrict sums) {
    __m256d lanes[kNumLanes / 4];
    for (size_t j = 0; j < kNumLanes / 4; ++j) lanes[j] = _mm256_loadu_pd(sums + 4 * j);
    for (size_t i = 0; i < n; i += kNumLanes) {
        __builtin_prefetch(x + i + kBlock / 2);
        __builtin_prefetch(error + i + kBlock / 2);
        add_wide(_mm256_add_ps(_mm256_loadu_ps(error + i), _mm256_loadu_ps(x + i)), lanes);
        if (i + 8 < n) add_wide(_mm256_add_ps(_mm256_loadu_ps(error + i + 8), _mm256_loadu_ps(x + i + 8)), lanes + 2);
    }
    for (size_t j = 0; j < kNumLanes / 4; ++j) _mm256_storeu_pd(sums + 4 * j, lanes[j]);
}

// error += x, whose signs are taken, 8 a byte, the first in the lowest bit, 1 for >= 0; what they do not say stays in `error`.
static void take_signs(const float* __restrict x, float* __restrict error, uint8_t* __restrict bits, size_t n, float scale) {
    const __m256 size = _mm256_set1_ps(scale), sign = _mm256_set1_ps(-0.0f);
    for (size_t i = 0; i < n; i += 8) {
        if (i % 16 == 0) {
            __builtin_prefetch(x + i + kBlock / 2);
            __builtin_prefetch(error + i + kBlock / 2, 1);
        }
        const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(error + i), _mm256_loadu_ps(x + i));
        const __m256 is_positive = _mm256_cmp_ps(sum, _mm256_setzero_ps(), _CMP_GE_OQ);
        bits[i / 8] = static_cast<uint8_t>(_mm256_movemask_ps(is_positive));
        _mm256_storeu_ps(error + i, _mm256_sub_ps(sum, _mm256_xor_ps(size, _mm256_andnot_ps(is_positive, sign))));
    }
}

// into += scale * sign, for the signs of `take_signs`.
static void add_signs(const uint8_t* __restrict bits, float* __restrict into, size_t n, float scale) {
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 size = _mm256_set1_ps(scale), sign = _mm256_set1_ps(-0.0f);
    for (size_t i = 0; i < n; i += 8) {
        const __m256i mine = _mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), places);
        const __m256 is_positive = _mm256_castsi256_ps(_mm256_cmpeq_epi32(mine, places));
        const __m256 said = _mm256_xor_ps(size, _mm256_andnot_ps(is_positive, sign));
        _mm256_storeu_ps(into + i, _mm256_add_ps(_mm256_loadu_ps(into + i), said));
    }
}

#else

// The squares of x + error, in kNumLanes lanes. n is a multiple of 8.
static void square_sums(const float* __restrict x, const float* __restrict error, size_t n, double* __restrict sums) {
    float added[kBlock];
    for (size_t i = 0; i < n; ++i) added[i] = error[i] + x[i];
    add_squares(added, n, sums);
}

// error += x, whose signs are taken, 8 a byte, the first in the lowest bit, 1 for >= 0; what they do not say stays in `error`.
static void take_signs(const float* __restrict x, float* __restrict error, uint8_t* __restrict bits, size_t n, float scale) {
    for (size_t i = 0; i < n; ++i) error[i] += x[i];
    for (size_t i = 0; i < n; i += 8) {
        uint32_t packed = 0;
        for (size_t j = 0; j < 8; ++j) packed |= static_cast<uint32_t>(error[i + j] >= 0) << j;
        bits[i / 8] = static_cast<uint8_t>(packed);
    }
    for (size_t i = 0; i < n; ++i) error[i] -= error[i] >= 0 ? scale : -scale;
}

// into += scale * sign, for the signs of `take_signs`.
static void add_signs(const uint8_t* __restrict bits, float* __restrict into, size_t n, float scale) {
    const uint32_t magnitude_bits = bits_of(scale);
    for (size_t i = 0; i < n; i += 8) {
        const uint32_t packed = bits[i / 8];
        for (uint32_t j = 0; j < 8; ++j) into[i + j] += float_of(magnitude_bits ^ (~packed >> j & 1) << 31);
    }
}

#endif
