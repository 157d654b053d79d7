// One new token of each sequence through all layers of a decoder: norm, projections, rotary positions, attention over a cache that
// it appends to, a gated MLP, residuals. Called by deepspeed/kernels/native_decode.py, so that a token costs one call, whatever the
// number of layers. The products and the attention are products.cpp's and attention.cpp's; what is between them is small, and
// summed in one order everywhere.

#include <cmath>
#include <vector>

#include <cstdint>

#include "kernels.h"
#include "native.h"

DS_API void ds_product(const uint8_t* weight, int bits, const float* scales, int64_t group_size, const float* x,
                       const float* bias, float* y, int64_t num_rows, int64_t width, int64_t batch, int num_threads);
DS_API void ds_decode_attention(const float* queries, float factor, const void* keys, const void* values, const float* key_scales,
                                const float* value_scales, const float* bias, const int64_t* ranges, const int64_t* strides,
                                float* out, int dtype, int query_dtype, int64_t batch, int64_t num_shared, int64_t heads, int64_t dim,
                                int num_threads);

namespace {

// A weight as ds_product takes it. `bits` 0: there is none.
struct Linear {
    const uint8_t* weight;
    const float *scales, *bias;
    int64_t bits, group_size, rows, width;
};

struct Layer {
    const float *before_attention, *before_mlp;  // [hidden]
    const float *query_norm, *key_norm;          // [dim], or null
    Linear query, key, value, out, gate, up, down;
    void *keys, *values;                // [batch, shared, capacity, dim], of fp32, or of int8 where there are
    float *key_scales, *value_scales;  // [batch, shared, capacity]
};

struct Shape {
    int64_t num_layers, hidden, heads, shared, dim, capacity, batch, num_threads;
    double eps;
};

void multiply(const Linear& linear, const float* x, float* y, const Shape& shape) {
    ds_product(linear.weight, static_cast<int>(linear.bits), linear.scales, linear.group_size, x, linear.bias, y, linear.rows,
               linear.width, shape.batch, static_cast<int>(shape.num_threads));
}

// rows x n: x over its root mean square, times a weight.
void normalize(const float* x, const float* weight, float* y, int64_t rows, int64_t n, double eps) {
    for (int64_t r = 0; r < rows; ++r, x += n, y += n) {
        float lanes[16] = {};
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            for (int64_t j = 0; j < 16; ++j) lanes[j] += x[i + j] * x[i + j];
        double sum = 0;
        for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
        for (const float lane : lanes) sum += lane;
        const float factor = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n) + eps));
        for (i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * factor);
    }
}

// x [heads, dim] of one sequence, rotated by its position.
void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; ++h, x += dim, y += dim)
        for (int64_t j = 0; j < half; ++j) {
            const float low = x[j], high = x[j + half];
            y[j] = low * cos[j] - high * sin[j];
            y[j + half] = high * cos[j + half] + low * sin[j + half];
        }
}

struct Scratch {
    std::vector<float> normed, query, key, value, rotated, turned, mixed, gate, up;

    void fit(const Shape& shape, int64_t inner) {
        const int64_t b = shape.batch;
        normed.resize(b * shape.hidden);
        query.resize(b * shape.heads * shape.dim);
        rotated.resize(query.size());
        turned.resize(shape.dim);
        mixed.resize(query.size());
        key.resize(b * shape.shared * shape.dim);
        value.resize(key.size());
        gate.resize(b * inner);
        up.resize(b * inner);
    }
};

// x [dim] to where a cache has it: as it is, or as int8 with a scale, rounded as kernels/reference/quantize.py says.
void store(const float* x, int64_t dim, void* cache, float* scales, int64_t at) {
    if (!scales) {
        float* to = static_cast<float*>(cache) + at * dim;
        for (int64_t j = 0; j < dim; ++j) to[j] = x[j];
        return;
    }
    float largest = 0;
    for (int64_t j = 0; j < dim; ++j) {
        const float magnitude = std::fabs(x[j]);
        largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
    }
    const float scale = scales[at] = largest / 127.0f;
    int8_t* to = static_cast<int8_t*>(cache) + at * dim;
    for (int64_t j = 0; j < dim; ++j) {
        const float value = scale > 0 && std::isfinite(scale) ? std::nearbyint(x[j] / scale) : 0.0f;
        to[j] = static_cast<int8_t>(value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value);
    }
}

void attend(const Layer& layer, const Shape& shape, Scratch& own, const float* cos, const float* sin, const int64_t* ranges,
            int64_t position) {
    const int64_t dim = shape.dim, queries = shape.heads * dim, keys = shape.shared * dim;
    multiply(layer.query, own.normed.data(), own.query.data(), shape);
    multiply(layer.key, own.normed.data(), own.key.data(), shape);
    multiply(layer.value, own.normed.data(), own.value.data(), shape);
    if (layer.query_norm) {
        normalize(own.query.data(), layer.query_norm, own.query.data(), shape.batch * shape.heads, dim, shape.eps);
        normalize(own.key.data(), layer.key_norm, own.key.data(), shape.batch * shape.shared, dim, shape.eps);
    }
    const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
    for (int64_t b = 0; b < shape.batch; ++b) {
        const float *c = cos + b * dim, *s = sin + b * dim;
        rotate(own.query.data() + b * queries, c, s, own.rotated.data() + b * queries, shape.heads, dim);
        for (int64_t h = 0; h < shape.shared; ++h) {
            const int64_t at = (b * shape.shared + h) * shape.capacity + position;
            rotate(own.key.data() + b * keys + h * dim, c, s, own.turned.data(), 1, dim);
            store(own.turned.data(), dim, layer.keys, layer.key_scales, at);
            store(own.value.data() + b * keys + h * dim, dim, layer.values, layer.value_scales, at);
        }
    }
    const int64_t of_head = shape.capacity * dim, of_batch = shape.shared * of_head;
    const int64_t all = shape.shared * shape.capacity, each = shape.capacity;
    const int64_t strides[15] = {of_batch, of_head, dim, of_batch, of_head, dim, all, each, 1, all, each, 1};
    ds_decode_attention(own.rotated.data(), factor, layer.keys, layer.values, layer.key_scales, layer.value_scales, nullptr, ranges,
                        strides, own.mixed.data(), layer.key_scales ? 4 : 1, kFloat32, shape.batch, shape.shared, shape.heads / shape.shared, dim,
                        static_cast<int>(shape.num_threads));
}

}  // namespace

// x [batch, hidden]: the embedded tokens, and after it what the last layer gives. cos, sin [batch, dim] of their positions; keys and
// values go to `position` of each cache; ranges [batch, 2]: the first position that a sequence sees, and position + 1.
DS_API void ds_decode_layers(const Layer* layers, const Shape* shape, float* x, const float* cos, const float* sin,
                             const int64_t* ranges, int64_t position) {
    static thread_local Scratch own;
    const int64_t numel = shape->batch * shape->hidden;
    for (int64_t index = 0; index < shape->num_layers; ++index) {
        const Layer& layer = layers[index];
        own.fit(*shape, layer.gate.rows);
        normalize(x, layer.before_attention, own.normed.data(), shape->batch, shape->hidden, shape->eps);
        attend(layer, *shape, own, cos, sin, ranges, position);
        multiply(layer.out, own.mixed.data(), own.normed.data(), *shape);
        for (int64_t i = 0; i < numel; ++i) x[i] += own.normed[i];
        normalize(x, layer.before_mlp, own.normed.data(), shape->batch, shape->hidden, shape->eps);
        multiply(layer.gate, own.normed.data(), own.gate.data(), *shape);
        multiply(layer.up, own.normed.data(), own.up.data(), *shape);
        const int64_t inner = shape->batch * layer.gate.rows;
        for (int64_t i = 0; i < inner; ++i) own.gate[i] = own.gate[i] / (1.0f + std::exp(-own.gate[i])) * own.up[i];
        multiply(layer.down, own.gate.data(), own.normed.data(), *shape);
        for (int64_t i = 0; i < numel; ++i) x[i] += own.normed[i];
    }
}
