"""A user's own layout, line by line as README.md shows it: scipy's compressed columns.

The contract suite runs on it without its route, by the dense fallback alone.
"""
# ruff: noqa: E401, I001  # two lines of imports on a page

import torch, sparse_layouts as sl
from scipy.sparse import csc_array


class CscTensor(sl.LayoutTensor):
    fields = ("values", "indices", "indptr")  # tensors, kept as inner_<name>

    @classmethod
    def from_dense(cls, dense):
        m = csc_array(dense.detach().numpy())
        return cls(*map(torch.from_numpy, (m.data, m.indices, m.indptr)), shape=m.shape)

    def to_dense(self):
        columns = torch.repeat_interleave(self.inner_indptr.diff(), output_size=self.nnz)
        dense = self.inner_values.new_zeros(self.shape)
        return dense.index_put_((self.inner_indices.long(), columns), self.inner_values)


@sl.route(torch.mm, input=CscTensor)
def csc_times_dense(input, mat2):
    if mat2.device.type != "cpu" or not input.dtype == mat2.dtype in (torch.float32, torch.float64):
        return NotImplemented
    w = csc_array(tuple(t.detach().numpy() for t in input.inner_tensors()), tuple(input.shape))
    return torch.from_numpy(w @ mat2.detach().numpy())
