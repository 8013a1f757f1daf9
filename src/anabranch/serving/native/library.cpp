// The functions Python calls. None of them throws: sizes are checked there.
#include <functional>
#include <memory>

#include "invariant.h"
#include "draw.h"
#include "step.h"

namespace {

using namespace anabranch;

struct Handle {
    Handle(const AnabranchModel& model, int threads) : team(threads) {
        switch (model.weights) {
            case 0: run = runner<F32>(model); break;
            case 1: run = runner<BF16>(model); break;
            default: run = runner<INT8>(model);
        }
    }

    template <class Kind>
    std::function<int(const AnabranchRows&)> runner(const AnabranchModel& model) {
        return [step = std::make_shared<Step<Kind>>(model, team)](const AnabranchRows& rows) { return step->run(rows); };
    }

    Team team;
    std::vector<Drawer> drawers;
    std::function<int(const AnabranchRows&)> run;
};

// Symmetric int8 of a page: keys with one scale a channel, values with one a token.
template <class T>
void quantise_head(const T* keys, int8_t* to, int dim) {
    const T* values = keys + int64_t{PAGE} * dim;
    int8_t* values_to = to + int64_t{PAGE} * dim;
    float* key_scale = reinterpret_cast<float*>(to + 2 * int64_t{PAGE} * dim);
    float* value_scale = key_scale + dim;
    const auto line = [](const T* from, int8_t* out, int n) {
        float most = 0.0f;
        for (int i = 0; i < n; ++i) most = std::max(most, std::fabs(widen(from[i])));
        const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
        for (int i = 0; i < n; ++i) out[i] = static_cast<int8_t>(std::lrint(widen(from[i]) * inverse));
        return scale;
    };
    for (int d = 0; d < dim; ++d) key_scale[d] = line(keys + d * PAGE, to + d * PAGE, PAGE);
    for (int t = 0; t < PAGE; ++t) value_scale[t] = line(values + t * dim, values_to + t * dim, dim);
}

}  // namespace

extern "C" {

void* anabranch_open(const AnabranchModel* model, int threads) { return new Handle(*model, threads); }

void anabranch_close(void* handle) { delete static_cast<Handle*>(handle); }

// Returns 0, or 1 + the number of an expert's record that is damaged: the step is then to be repeated.
int anabranch_step(void* handle, const AnabranchRows* rows) {
    return 1 + static_cast<Handle*>(handle)->run(*rows);
}

uint64_t anabranch_checksum(const uint8_t* data, int64_t bytes) { return checksum(data, bytes); }

// tokens[i] is drawn by draws[i] from its row of `logits`, which are `stride` apart.
void anabranch_draw(void* handle, const float* logits, int64_t stride, int vocab, const AnabranchDraw* draws,
                    int count, int32_t* tokens) {
    auto& open = *static_cast<Handle*>(handle);
    open.drawers.resize(open.team.members());
    open.team.run([&](int member) {
        for (int i; (i = open.team.take()) < count;)
            tokens[i] = open.drawers[member].draw(logits + draws[i].row * stride, vocab, draws[i]);
    });
}

int64_t anabranch_page_bytes(int layers, int heads, int dim, int format) {
    return PageShape{layers, heads, dim}.page_bytes(static_cast<Format>(format));
}

// Rewrites a full fp32 or bf16 page as an int8 page.
void anabranch_quantise(uint8_t* const* pools, int layers, int heads, int dim, int32_t from, int32_t to) {
    const PageShape shape{layers, heads, dim};
    const Pools all{{pools[0], pools[1], pools[2]}};
    for (int l = 0; l < layers; ++l)
        for (int h = 0; h < heads; ++h) {
            const uint8_t* page = all.head(shape, from, l, h);
            auto* out = reinterpret_cast<int8_t*>(all.head(shape, to, l, h));
            if (from >> FORMAT_SHIFT == KV_F32)
                quantise_head(reinterpret_cast<const float*>(page), out, dim);
            else
                quantise_head(reinterpret_cast<const bf16*>(page), out, dim);
        }
}

// Rows of x, sorted into groups; group e, which ends before ends[e], is multiplied with matrix e of `weights`
// [groups][outputs][inputs].
void anabranch_product(const float* x, const float* weights, const int32_t* ends, float* out, int groups, int inputs,
                       int outputs) {
    Product product;
    for (int e = 0, first = 0; e < groups; first = ends[e++])
        if (ends[e] > first)
            product.run(x + int64_t{first} * inputs, weights + int64_t{e} * outputs * inputs,
                        out + int64_t{first} * outputs, ends[e] - first, inputs, outputs);
}

void anabranch_attention(const AnabranchAttention* call) { RowAttention(*call).run(); }
}
