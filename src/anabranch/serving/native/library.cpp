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

// One line of numbers as codes, in int4: number = zero + scale * code. Codes are of the rounded scale and zero, the
// scale rounded up, so that the largest number has a code.
struct Coded {
    bf16 scale, zero;
};

inline bf16 at_least(float value) {
    bf16 rounded;
    narrow(&rounded, value);
    if (widen(rounded) < value) ++rounded.bits;
    return rounded;
}

// One line of n numbers in int8, the smallest scale at which all have a code in it: see scale_of. The first eight
// codes are the nearest of those that are even or odd as the scale wants it.
template <class T>
void code8(const T* from, int n, int8_t* to) {
    float most = 0.0f;
    for (int i = 0; i < n; ++i) most = std::max(most, std::fabs(widen(from[i])));
    const auto place = std::lower_bound(SCALES.begin(), SCALES.end() - 1, most / 127.0f);
    const auto bits = static_cast<int>(place - SCALES.begin());
    const float inverse = 1.0f / *place;
    for (int i = 0; i < n; ++i) {
        const float wanted = std::clamp(widen(from[i]) * inverse, -127.0f, 127.0f);
        const int apart = i < 8 ? 2 : 1, bit = i < 8 ? bits >> i & 1 : 0;
        const auto nearest = apart * std::lrint((wanted - bit) / apart) + bit;
        to[i] = static_cast<int8_t>(nearest > 127 ? 126 : nearest);
    }
}

template <class T>
Coded code4(const T* from, int n, uint8_t* to) {
    float low = widen(from[0]), high = low;
    for (int i = 1; i < n; ++i) {
        low = std::min(low, widen(from[i]));
        high = std::max(high, widen(from[i]));
    }
    Coded coded;
    narrow(&coded.zero, low);
    const float zero = widen(coded.zero);
    coded.scale = at_least((high - zero) / 15.0f);
    const float inverse = high > zero ? 1.0f / widen(coded.scale) : 0.0f;
    for (int i = 0; i < n; ++i)
        to[i] = static_cast<uint8_t>(std::min(15L, std::max(0L, std::lrint((widen(from[i]) - zero) * inverse))));
    return coded;
}

template <class T>
void quantise_int8(const T* keys, uint8_t* to, int dim) {
    auto* codes = reinterpret_cast<int8_t*>(to);
    for (int d = 0; d < dim; ++d) code8(keys + d * PAGE, PAGE, codes + d * PAGE);
    const int64_t values = int64_t{PAGE} * dim;
    for (int t = 0; t < PAGE; ++t) code8(keys + values + t * dim, dim, codes + values + t * dim);
}

template <class T>
void quantise_int4(const T* keys, uint8_t* to, int dim) {
    const T* values = keys + int64_t{PAGE} * dim;
    uint8_t* codes = to;
    auto* scale = reinterpret_cast<bf16*>(to + int64_t{PAGE} * dim);
    std::vector<uint8_t> line(2 * std::max(dim, PAGE));
    const auto two_lines = [&](const T* from, int n, bf16* scales, bf16* zeros) {
        for (int i = 0; i < 2; ++i) {
            const Coded coded = code4(from + int64_t{i} * n, n, line.data() + i * n);
            scales[i] = coded.scale;
            zeros[i] = coded.zero;
        }
        for (int i = 0; i < n; ++i) *codes++ = static_cast<uint8_t>(line[i] | line[n + i] << 4);
    };
    for (int d = 0; d < dim; d += 2) two_lines(keys + d * PAGE, PAGE, scale + d, scale + dim + d);
    scale += 2 * dim;
    for (int t = 0; t < PAGE; t += 2) two_lines(values + t * dim, dim, scale + t, scale + PAGE + t);
}

template <class T>
void rewrite_head(const uint8_t* page, Format format, uint8_t* to, int dim) {
    const T* keys = reinterpret_cast<const T*>(page);
    const int64_t numbers = 2 * int64_t{PAGE} * dim;
    switch (format) {
        case KV_F32:
            for (int64_t i = 0; i < numbers; ++i) reinterpret_cast<float*>(to)[i] = widen(keys[i]);
            break;
        case KV_BF16:
            for (int64_t i = 0; i < numbers; ++i) narrow(reinterpret_cast<bf16*>(to) + i, widen(keys[i]));
            break;
        case KV_INT8: quantise_int8(keys, to, dim); break;
        default: quantise_int4(keys, to, dim);
    }
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

// Rewrites a full fp32 or bf16 page in the format of another.
void anabranch_rewrite(uint8_t* const* pools, int layers, int heads, int dim, int32_t from, int32_t to) {
    const PageShape shape{layers, heads, dim};
    const Pools all(pools);
    const auto format = static_cast<Format>(to >> FORMAT_SHIFT);
    for (int l = 0; l < layers; ++l)
        for (int h = 0; h < heads; ++h) {
            const uint8_t* page = all.head(shape, from, l, h);
            uint8_t* out = all.head(shape, to, l, h);
            if (from >> FORMAT_SHIFT == KV_F32)
                rewrite_head<float>(page, format, out, dim);
            else
                rewrite_head<bf16>(page, format, out, dim);
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
