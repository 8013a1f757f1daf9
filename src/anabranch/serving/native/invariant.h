// Products and attention in fp32 whose every row is computed alone: a row's sums have one fixed order, whatever other
// rows are in the batch and wherever it lies in it. Weights are read as torch keeps them, so that they may change
// between any two calls.
#pragma once
#include <algorithm>
#include <vector>

#include "matrix.h"

namespace anabranch {

// `rows` rows of `inputs` numbers times a matrix [outputs][inputs], packed block by block as matrix.h reads it.
class Product {
   public:
    void run(const float* x, const float* weights, float* out, int rows, int inputs, int outputs) {
        packed_.resize(size_t(inputs) * BLOCK);
        rows_.resize(rows);
        for (int r = 0; r < rows; ++r) rows_[r] = x + int64_t{r} * inputs;
        for (int first = 0; first < outputs; first += BLOCK) {
            const int columns = std::min(BLOCK, outputs - first);
            pack(weights + int64_t{first} * inputs, inputs, columns);
            multiply_block<F32>(reinterpret_cast<const uint8_t*>(packed_.data()), nullptr, inputs, rows_.data(), rows,
                                [&](int r, const f32x16* sums) {
                                    std::memcpy(out + int64_t{r} * outputs + first, sums, columns * sizeof(float));
                                });
        }
    }

   private:
    // Input by input, the block's outputs side by side; missing ones are zero.
    void pack(const float* weights, int inputs, int columns) {
        constexpr int STRIP = 16;  // inputs at once: a cache line of each output
        for (int from = 0; from < inputs; from += STRIP) {
            const int to = std::min(from + STRIP, inputs);
            for (int n = 0; n < BLOCK; ++n)
                for (int k = from; k < to; ++k)
                    packed_[size_t(k) * BLOCK + n] = n < columns ? weights[int64_t{n} * inputs + k] : 0.0f;
        }
    }

    std::vector<const float*> rows_;
    std::vector<float> packed_;
};

}  // namespace anabranch

extern "C" {

// Strides, in numbers: of a sequence, a head and a token; the channels of a head lie side by side.
struct AnabranchHeads {
    const float* data;
    int64_t sequence, head, token;
};

struct AnabranchAttention {
    int32_t sequences, heads, kv_heads, rows, tokens, dim;
    float scale;
    AnabranchHeads query, key, value;
    const int32_t* first;  // [sequences][rows] a row attends to these keys: from here
    const int32_t* last;   // to before there; none where both are equal, which gives zeros
    float* out;            // [sequences][rows][heads][dim]
};
}

namespace anabranch {

class RowAttention {
   public:
    explicit RowAttention(const AnabranchAttention& call)
        : call_(call), tokens_(up(call.tokens) + LANES), dim_(up(call.dim)) {
        keys_.resize(size_t(call.dim) * tokens_);
        values_.resize(size_t(call.tokens) * dim_);
        scores_.resize(tokens_);
        out_.resize(dim_);
    }

    void run() {
        const int group = call_.heads / call_.kv_heads;
        for (int s = 0; s < call_.sequences; ++s)
            for (int g = 0; g < call_.kv_heads; ++g) {
                gather(s, g);
                for (int r = 0; r < call_.rows; ++r)
                    for (int h = g * group; h < (g + 1) * group; ++h) attend(s, r, h);
            }
    }

   private:
    static int up(int n) { return (n + LANES - 1) / LANES * LANES; }

    // Keys channel by channel, so that 16 tokens' scores need no sum across lanes; values padded to whole registers.
    void gather(int s, int g) {
        const float* key = call_.key.data + s * call_.key.sequence + g * call_.key.head;
        const float* value = call_.value.data + s * call_.value.sequence + g * call_.value.head;
        for (int n = 0; n < call_.tokens; ++n)
            for (int d = 0; d < call_.dim; ++d) {
                keys_[size_t(d) * tokens_ + n] = key[n * call_.key.token + d];
                values_[size_t(n) * dim_ + d] = value[n * call_.value.token + d];
            }
    }

    void attend(int s, int r, int h) {
        const float* query = call_.query.data + s * call_.query.sequence + h * call_.query.head + r * call_.query.token;
        const int64_t row = int64_t{s} * call_.rows + r;
        const int first = call_.first[row], count = call_.last[row] - first;
        float* out = call_.out + (row * call_.heads + h) * call_.dim;
        std::fill(out_.begin(), out_.end(), 0.0f);
        if (count > 0) {
            const float scale = 1.0f / weigh(query, first, count);
            for (int n = 0; n < count; ++n)
                for (int d = 0; d < dim_; d += LANES)
                    store(&out_[d], load(&out_[d]) + load(&values_[size_t(first + n) * dim_ + d]) * scores_[n]);
            for (int d = 0; d < call_.dim; ++d) out_[d] *= scale;
        }
        std::copy(out_.begin(), out_.begin() + call_.dim, out);
    }

    // Exponentials of the scores, and their sum.
    float weigh(const float* query, int first, int count) {
        f32x16 most = splat(-INFINITY), total{};
        for (int n = 0; n < count; n += LANES) {
            f32x16 score{};
            for (int d = 0; d < call_.dim; ++d) score += load(&keys_[size_t(d) * tokens_ + first + n]) * query[d];
            score *= call_.scale;
            for (int i = count - n; i < LANES; ++i) score[i] = -INFINITY;
            store(&scores_[n], score);
            most = larger(most, score);
        }
        const float top = largest(most);
        for (int n = 0; n < count; n += LANES) {
            f32x16 e = exponential(load(&scores_[n]) - top);
            for (int i = count - n; i < LANES; ++i) e[i] = 0.0f;
            store(&scores_[n], e);
            total += e;
        }
        return sum(total);
    }

    const AnabranchAttention& call_;
    const int tokens_, dim_;
    std::vector<float> keys_, values_, scores_, out_;
};

}  // namespace anabranch
