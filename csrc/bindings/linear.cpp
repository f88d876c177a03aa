// linear and rms_norm of specdec_ops._C.
#include "struct_fields/linear.h"
#include "bindings/bind.h"
#include "linear/cpu/entry_points.h"
#include "linear/params.h"
#ifdef SPECDEC_WITH_CUDA
#include "linear/cuda/launchers.h"
#endif

namespace specdec {

static void derive(LinearParams& p, Call& call) {
  Tensor x = call.tensor("x"), residual = call.tensor("residual"), out = call.tensor("out");
  p.rows = int32_t(x.size(0)), p.dim = int32_t(x.size(1)), p.outputs = int32_t(out.size(1));
  p.x_stride_row = x.stride(0), p.out_stride_row = out.stride(0);
  p.residual_stride_row = residual ? residual.stride(0) : 0;
  p.dtype = x.dtype();
  p.bias_dtype = call.tensor("bias").dtype();
  p.norm_dtype = call.tensor("norm_weight").dtype();
}

static void derive(RmsNormParams& p, Call& call) {
  Tensor x = call.tensor("x"), residual = call.tensor("residual");
  p.rows = int32_t(x.size(0)), p.dim = int32_t(x.size(1));
  p.x_stride_row = x.stride(0), p.out_stride_row = call.tensor("out").stride(0);
  p.residual_stride_row = residual ? residual.stride(0) : 0;
  p.dtype = x.dtype(), p.weight_dtype = call.tensor("weight").dtype();
}

void bind_linear(py::module_& m) {
  bind_op(m, "linear", linear_cpu);
  bind_op(m, "rms_norm", rms_norm_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<LinearParams>(m, "linear", linear_scratch, linear_cuda);
  bind_cuda<RmsNormParams, RmsNormParams>(m, "rms_norm", nullptr, rms_norm_cuda);
#endif
}

}  // namespace specdec
