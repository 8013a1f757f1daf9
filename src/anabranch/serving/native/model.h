// What Python hands over, field by field as in serving/native/library.py. Pointers stay Python's.
#pragma once
#include <cstdint>

extern "C" {

// One decoder layer. Matrices are packed as matrix.h says; experts lie one after the other.
struct AnabranchLayer {
    const float* attention_norm;
    const float* mlp_norm;
    const float* q_norm;    // null where queries and keys are not normalised
    const float* k_norm;
    const uint8_t* qkv;
    const float* qkv_bias;  // null where there is none
    const uint8_t* out;
    const float* out_bias;
    const uint8_t* router;  // fp32, packed; null for a dense layer, which is one expert for all
    const uint8_t* gate_up;    // blocks of 16 gates and their 16 ups
    const uint8_t* down;       // a run of blocks of every expert, then the next
    const uint8_t* shared_gate_up;
    const uint8_t* shared_down;
    const float* shared_gate;
    int32_t experts, top_k, width;  // width: padded to 32
    int32_t shared_width;           // 0 where no expert is shared
    int32_t first_record;           // of its experts in the store, where gate_up and down are null
};

// Experts in a file, of which some are in memory; see store.h.
struct AnabranchStore {
    int32_t file, slots, records;
    int64_t first_byte, record_bytes;
    uint8_t* arena;             // [slots][record_bytes], aligned to 4096
    const uint64_t* checksums;  // [records]
    const float* wanted;        // [records] the least wanted gives way
    uint8_t* needed;            // [records] set to 1 where a step needs it
    int64_t* figures;           // hits, late, misses, reads, wait_ns: the step adds to them
};

struct AnabranchModel {
    int32_t weights;  // what matrices are packed as: 0 fp32, 1 bf16, 2 int8
    int32_t layers, hidden, heads, kv_heads, head_dim, vocab;
    int32_t rotary_dim, normalise_top_k, qk_norm_all;  // qk_norm_all: over all heads at once
    float eps;
    const void* embedding;  // [vocab][hidden]
    const float* final_norm;
    const uint8_t* head;
    const float* cosines;   // [positions][rotary_dim / 2]
    const float* sines;
    const AnabranchLayer* layer;
    const AnabranchStore* store;  // null where all experts are in memory
};

// The tokens of one step, a row each, rows of a chain in order.
struct AnabranchRows {
    int32_t rows, wanted;
    int32_t one_each;         // no two rows are of one chain
    int32_t table_stride;
    const int32_t* token;     // [rows]
    const int32_t* position;  // [rows] of the rotary embedding
    const int32_t* length;    // [rows] cached tokens the row attends to, itself the last
    const int32_t* chain;     // [rows] its line of `table`
    const int32_t* table;     // [chains][table_stride] page numbers
    const int32_t* want;      // [wanted] rows whose logits are wanted
    uint8_t* pool[4];         // by format
    int32_t pool_pages[4];    // how many there are of each
    float* logits;            // [wanted][vocab padded to 32]
    int32_t* best;            // [wanted] the most probable token
    float* log_total;         // [wanted] log of the sum of exponentials of the logits
    int32_t* routed;          // [layers][rows][top_k] experts, null where not asked
    float* mass;              // [rows][kv_heads][table_stride] attention by page, summed over layers; or null
};

// How the next token of one row is drawn. temperature 0 takes the most probable one.
struct AnabranchDraw {
    int32_t row;      // of the logits
    float temperature;
    int32_t top_k;    // 0 for all
    float top_p, min_p, penalty;
    int32_t seen_count;
    const int32_t* seen;  // distinct tokens that the penalty is for
    double u;         // in [0, 1)
};
}
