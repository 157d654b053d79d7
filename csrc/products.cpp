// y = x W^T + b for few rows of x, from weights in fp32, bf16, int8 or int4: what a model does for one token after the other.
// Called by deepspeed/kernels/native_products.py. The rows of W are dealt to the threads, each is read once, and meets all rows
// of x while it is in the first-level cache. Results depend neither on threads nor on the instruction set.

#include <cmath>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "native.h"
#include "threads.h"

namespace {

constexpr int64_t kTaskBytes = 64 * 1024;

// The rows of x as int16 with a scale per group. For int4 the even elements of each 32 come before the odd ones, and `starts`
// has what takes back the 8 that is added to its weights.
struct Vectors {
    std::vector<int16_t> values;
    std::vector<int32_t> starts;
    std::vector<float> scales;

    void fill(const float* x, int64_t numel, int64_t group_size, bool is_int4) {
        const int64_t num_groups = numel / group_size;
        values.resize(numel);
        scales.resize(num_groups);
        starts.assign(num_groups, 0);
        for (int64_t g = 0; g < num_groups; ++g, x += group_size) {
            float largest = 0;
            bool is_finite = true;
            for (int64_t i = 0; i < group_size; ++i) {
                const float magnitude = std::fabs(x[i]);
                is_finite = is_finite && magnitude <= 3.0e38f;
                largest = magnitude > largest ? magnitude : largest;
            }
            int16_t* to = values.data() + g * group_size;
            scales[g] = is_finite ? largest / 32767.0f : NAN;
            int32_t sum = 0;
            for (int64_t i = 0; i < group_size; ++i) {
                const float value = is_finite && scales[g] > 0 ? x[i] / scales[g] : 0.0f;
                const int32_t rounded = static_cast<int32_t>(std::nearbyint(value));
                const int32_t q = rounded > 32767 ? 32767 : rounded < -32767 ? -32767 : rounded;
                to[is_int4 ? i / 32 * 32 + i % 2 * 16 + i % 32 / 2 : i] = static_cast<int16_t>(q);
                sum += q;
            }
            starts[g] = -8 * sum;
        }
    }
};

struct Product {
    const ProductLoops& loops;
    const uint8_t* weight;
    int bits;  // 32, 16, 8 or 4
    const float* scales;
    int64_t group_size;
    const float *x, *bias;
    float* y;
    int64_t num_rows, width, batch, rows_per_task;
    const Vectors* vectors;

    int64_t row_nbytes() const { return width * bits / 8; }

    float dot(int64_t row, int64_t b) const {
        const uint8_t* w = weight + row * row_nbytes();
        if (bits >= 16) return (bits == 32 ? loops.fp32 : loops.bf16)(w, x + b * width, static_cast<size_t>(width));
        const int64_t groups = width / group_size;
        return (bits == 8 ? loops.int8 : loops.int4)(
            w, vectors->values.data() + b * width, vectors->starts.data() + b * groups, scales + row * groups,
            vectors->scales.data() + b * groups, static_cast<size_t>(groups), static_cast<size_t>(group_size));
    }
};

}  // namespace

// weight [num_rows, width], row by row, of 32 (fp32), 16 (bf16), 8 or 4 bits; the last two with scales [num_rows, width /
// group_size], group_size a multiple of 32 and at most 4096, int4 two a byte, the even one in the low bits, 8 added. x [batch, width],
// bias [num_rows] or null, y [batch, num_rows].
DS_API void ds_product(const uint8_t* weight, int bits, const float* scales, int64_t group_size, const float* x,
                       const float* bias, float* y, int64_t num_rows, int64_t width, int64_t batch, int num_threads) {
    static thread_local Vectors vectors;
    if (bits < 16) vectors.fill(x, batch * width, group_size, bits == 4);
    Product product{current_kernels().products, weight, bits, scales, group_size, x, bias, y, num_rows, width, batch, 1, &vectors};
    const int64_t fitting = kTaskBytes / product.row_nbytes();
    product.rows_per_task = fitting > 0 ? fitting : 1;
    const int64_t num_tasks = (num_rows + product.rows_per_task - 1) / product.rows_per_task;
    parallel_for(num_tasks, num_threads, [](void* self, int64_t index) {
        const Product& all = *static_cast<Product*>(self);
        const int64_t stop = (index + 1) * all.rows_per_task;
        for (int64_t row = index * all.rows_per_task; row < stop && row < all.num_rows; ++row)
            for (int64_t b = 0; b < all.batch; ++b)
                all.y[b * all.num_rows + row] = all.dot(row, b) + (all.bias ? all.bias[row] : 0.0f);
    }, &product);
}

// The sum of numel floats' bits, read as fast as this processor can: what the bandwidth of a product is compared with.
DS_API uint64_t ds_read(const uint64_t* words, int64_t numel) {
    uint64_t a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    for (int64_t i = 0; i + 8 <= numel; i += 8) {
        __builtin_prefetch(words + i + 128);
        a += words[i]; b += words[i + 1]; c += words[i + 2]; d += words[i + 3];
        e += words[i + 4]; f += words[i + 5]; g += words[i + 6]; h += words[i + 7];
    }
    return a + b + c + d + e + f + g + h;
}
