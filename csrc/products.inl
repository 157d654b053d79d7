// Dot products of one row of a weight with a vector, once per instruction set; included by kernels.inl. They are bound by the
// memory that the row is read from, so the aim is few operations per byte.
//
// Floats are summed in 32 lanes, integers in 8 lanes per group, which are then scaled and summed in 8 lanes of floats: the same
// bits on every instruction set. Vectors beside integers are int16, with a scale per group: 15 bits, far finer than the weights.

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Halves8 __attribute__((vector_size(16), aligned(2), may_alias));

constexpr size_t kAhead = 1024;  // bytes that are asked for before they are read

#define DS_SUM8(v) ((((v)[0] + (v)[4]) + ((v)[2] + (v)[6])) + (((v)[1] + (v)[5]) + ((v)[3] + (v)[7])))

static float dot_fp32(const void* row, const float* x, size_t n) {
    const float* w = static_cast<const float*>(row);
    Floats8 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(w + i + kAhead / 4);
        __builtin_prefetch(w + i + kAhead / 4 + 16);
        s0 += *reinterpret_cast<const Floats8*>(w + i) * *reinterpret_cast<const Floats8*>(x + i);
        s1 += *reinterpret_cast<const Floats8*>(w + i + 8) * *reinterpret_cast<const Floats8*>(x + i + 8);
        s2 += *reinterpret_cast<const Floats8*>(w + i + 16) * *reinterpret_cast<const Floats8*>(x + i + 16);
        s3 += *reinterpret_cast<const Floats8*>(w + i + 24) * *reinterpret_cast<const Floats8*>(x + i + 24);
    }
    const Floats8 s = (s0 + s2) + (s1 + s3);
    float sum = DS_SUM8(s);
    for (; i < n; ++i) sum += w[i] * x[i];
    return sum;
}

#define DS_WIDE(at) ((Floats8)(__builtin_convertvector(*reinterpret_cast<const Halves8*>(at), Words8) << 16))

static float dot_bf16(const void* row, const float* x, size_t n) {
    const uint16_t* w = static_cast<const uint16_t*>(row);
    Floats8 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(w + i + kAhead / 2);
        s0 += DS_WIDE(w + i) * *reinterpret_cast<const Floats8*>(x + i);
        s1 += DS_WIDE(w + i + 8) * *reinterpret_cast<const Floats8*>(x + i + 8);
        s2 += DS_WIDE(w + i + 16) * *reinterpret_cast<const Floats8*>(x + i + 16);
        s3 += DS_WIDE(w + i + 24) * *reinterpret_cast<const Floats8*>(x + i + 24);
    }
    const Floats8 s = (s0 + s2) + (s1 + s3);
    float sum = DS_SUM8(s);
    for (; i < n; ++i) sum += float_of(static_cast<uint32_t>(w[i]) << 16) * x[i];
    return sum;
}

#ifdef DS_HAS_AVX2

static float dot_int8(const uint8_t* w, const int16_t* x, const int32_t*, const float* weight_scales, const float* x_scales,
                      size_t num_groups, size_t group_size) {
    __m256 sums = _mm256_setzero_ps();
    for (size_t g = 0; g < num_groups; ++g) {
        __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
        for (size_t i = 0; i < group_size; i += 32, w += 32, x += 32) {
            __builtin_prefetch(w + kAhead);
            const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
            const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16)));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(w0, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(w1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16))));
        }
        const __m256 scale = _mm256_set1_ps(weight_scales[g] * x_scales[g]);
        sums = _mm256_add_ps(sums, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), scale));
    }
    const Floats8 s = (Floats8)sums;
    return DS_SUM8(s);
}

static float dot_int4(const uint8_t* w, const int16_t* x, const int32_t* starts, const float* weight_scales,
                      const float* x_scales, size_t num_groups, size_t group_size) {
    __m256 sums = _mm256_setzero_ps();
    const __m256i low = _mm256_set1_epi16(15);
    for (size_t g = 0; g < num_groups; ++g) {
        __m256i a = _mm256_zextsi128_si256(_mm_cvtsi32_si128(starts[g])), b = _mm256_setzero_si256();
        for (size_t i = 0; i < group_size; i += 32, w += 16, x += 32) {
            if (i % 64 == 0) __builtin_prefetch(w + kAhead);
            const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
            const __m256i even = _mm256_and_si256(both, low), odd = _mm256_srli_epi16(both, 4);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(even, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(odd, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16))));
        }
        const __m256 scale = _mm256_set1_ps(weight_scales[g] * x_scales[g]);
        sums = _mm256_add_ps(sums, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), scale));
    }
    const Floats8 s = (Floats8)sums;
    return DS_SUM8(s);
}

#else

// Scales a group's 8 integer sums and adds them to the 8 lanes.
static inline void add_group(const int32_t* group, float scale, float* sums) {
    for (size_t j = 0; j < 8; ++j) sums[j] += static_cast<float>(group[j]) * scale;
}

static float dot_int8(const uint8_t* w, const int16_t* x, const int32_t*, const float* weight_scales, const float* x_scales,
                      size_t num_groups, size_t group_size) {
    float sums[8] = {};
    for (size_t g = 0; g < num_groups; ++g) {
        int32_t group[8] = {};
        for (size_t i = 0; i < group_size; i += 16, w += 16, x += 16)
            for (size_t j = 0; j < 8; ++j)
                group[j] += static_cast<int8_t>(w[2 * j]) * x[2 * j] + static_cast<int8_t>(w[2 * j + 1]) * x[2 * j + 1];
        add_group(group, weight_scales[g] * x_scales[g], sums);
    }
    return DS_SUM8(sums);
}

static float dot_int4(const uint8_t* w, const int16_t* x, const int32_t* starts, const float* weight_scales,
                      const float* x_scales, size_t num_groups, size_t group_size) {
    float sums[8] = {};
    for (size_t g = 0; g < num_groups; ++g) {
        int32_t group[8] = {starts[g]};
        for (size_t i = 0; i < group_size; i += 32, w += 16, x += 32)
            for (size_t j = 0; j < 8; ++j)
                for (size_t k = 2 * j; k < 2 * j + 2; ++k) group[j] += (w[k] & 15) * x[k] + (w[k] >> 4) * x[16 + k];
        add_group(group, weight_scales[g] * x_scales[g], sums);
    }
    return DS_SUM8(sums);
}

#endif
