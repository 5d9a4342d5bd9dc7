// Records that threads bring into slots while a forward pass runs: what the pass asks of them.
#pragma once

namespace ms {

// The experts of one layer that a stopped pass is to run as soon as each is there.
// expert_ids, was_run: [count]. stall_s: seconds in which there was nothing to run.
struct Arrivals {
    void* transfers;
    int64_t layer;  // among the MoE layers
    int64_t count;
    const int64_t* expert_ids;
    uint8_t* was_run;
    double stall_s;
};

// Wait until experts that were not run are in their slots; put the slots into the layer's table,
// and mark them in `ready`, [num_experts], and in was_run. Returns how many; 0: all were run; -1:
// one has failed and no other is there.
int64_t await_arrivals(Arrivals& arrivals, const ExpertTable& experts, uint8_t* ready);

}  // namespace ms
