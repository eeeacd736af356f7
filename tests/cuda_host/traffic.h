// What the scheduler of host_run.cpp tells the counting of traffic.cpp.
#pragma once
#include <cstddef>

namespace host_run {

// All threads have come to a barrier of their block, or to their end.
void end_traced_phase();
void end_traced_launch();
void reset_traffic();

}  // namespace host_run
