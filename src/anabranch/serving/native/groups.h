// Which rows of a step are computed together: those of an expert, and those that attend to the same pages.
#pragma once
#include <algorithm>
#include <vector>

#include "attend.h"
#include "model.h"

namespace anabranch {

// Rows of each expert, in order of experts and then of rows.
struct Groups {
    std::vector<int> start, pair, active;  // pair: row * top_k + choice

    void sort(const int32_t* ids, int pairs, int experts) {
        start.assign(experts + 1, 0);
        pair.resize(pairs);
        active.clear();
        for (int i = 0; i < pairs; ++i) ++start[ids[i] + 1];
        for (int e = 0; e < experts; ++e) {
            if (start[e + 1]) active.push_back(e);
            start[e + 1] += start[e];
        }
        std::vector<int> next(start.begin(), start.end() - 1);
        for (int i = 0; i < pairs; ++i) pair[next[ids[i]]++] = i;
    }
};

constexpr int MAX_QUERIES = 32;  // of one key-value head, that attend to a page together

// Neighbours whose chains begin with the same full pages, as samples of a prompt do. pages: a multiple of RUN, so that
// each attends as it would alone.
struct Alike {
    int first, rows, pages;
};

inline Cached cached_of(const AnabranchRows& rows, int r, int head) {
    return {rows.table + int64_t{rows.chain[r]} * rows.table_stride, rows.length[r], head};
}

// Full pages with which two rows begin, in whole runs.
inline int common_pages(const AnabranchRows& rows, int r, int s) {
    const Cached one = cached_of(rows, r, 0), other = cached_of(rows, s, 0);
    const int full = std::min(one.pages(), other.pages()) - 1;
    return static_cast<int>(std::mismatch(one.table, one.table + full, other.table).first - one.table) / RUN * RUN;
}

// All rows, up to `most` together; each by itself where rows of one chain follow each other, or pages are weighed.
inline void find_alike(const AnabranchRows& rows, int most, std::vector<Alike>& found) {
    found.clear();
    for (int r = 0; r < rows.rows; ++r) {
        Alike* last = found.empty() ? nullptr : &found.back();
        const bool may = last && last->rows < most && rows.one_each && !rows.mass;
        const int pages = may ? common_pages(rows, last->first, r) : 0;
        if (pages && (last->rows == 1 || pages >= last->pages)) {
            if (last->rows++ == 1) last->pages = pages;
        } else {
            found.push_back({r, 1, 0});
        }
    }
}

}  // namespace anabranch
