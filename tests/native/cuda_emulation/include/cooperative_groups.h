// Stands in for CUDA's header of this name: a cluster of blocks.
#pragma once

#include "cuda_runtime_api.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() {
    return emulation::cluster_rank();
  }
  static unsigned num_blocks() {
    return emulation::cluster_size();
  }
  static void barrier_arrive(emulation::Site site = emulation::Site::current()) {
    emulation::cluster_arrive(site);
  }
  static void barrier_wait(emulation::Site site = emulation::Site::current()) {
    emulation::cluster_wait(site);
  }
  static void sync(emulation::Site site = emulation::Site::current()) {
    emulation::cluster_arrive(site);
    emulation::cluster_wait(site);
  }
  template <typename T>
  static T* map_shared_rank(T* pointer, unsigned rank, emulation::Site site = emulation::Site::current()) {
    return static_cast<T*>(emulation::peer_shared(pointer, rank, site));
  }
};

inline cluster_group this_cluster() {
  return {};
}

}  // namespace cooperative_groups
