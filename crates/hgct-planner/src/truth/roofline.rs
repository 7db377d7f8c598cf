//! What a transformer's layers take on an accelerator of which only the public figures are known.
//!
//! A matrix multiplication is cut into tiles; all cores do a tile each, wave after wave, and the last
//! wave is as long as a full one. It takes the longer of that and of moving its operands. All other
//! kernels take what moving their operands takes. Tensor parallelism adds rings of activations.

use super::Constants;
use crate::tables::MeasuredTransformer;

/// Public figures of an accelerator in its node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Accelerator {
    /// Dense two-byte peak, operations a second.
    pub peak_flops: f64,
    /// Bytes a second.
    pub memory_bytes_per_s: f64,
    /// Cores that work on a tile each.
    pub cores: f64,
    /// What a ring inside of a node moves, bytes a second and device.
    pub ring_bytes_per_s: f64,
    /// Devices a node.
    pub devices_per_node: u32,
    /// Line rate of the network, bytes a second and device.
    pub network_bytes_per_s: f64,
}

impl Accelerator {
    /// NVIDIA A100 40 GB in nodes of 8 with a 200 Gbit/s card for two devices (four for 800 Gbit/s a
    /// node). Peak, memory and cores: the product's data sheet. Ring: 600 GB/s of NVLink both ways,
    /// of which all-reduce reaches about 235 GB/s (published nccl-tests of such nodes).
    pub fn a100() -> Self {
        Self {
            peak_flops: 312e12,
            memory_bytes_per_s: 1555e9,
            cores: 108.0,
            ring_bytes_per_s: 235e9,
            devices_per_node: 8,
            network_bytes_per_s: 12.5e9,
        }
    }
}

/// Seconds of the layers of a GPT on one device of a tensor parallel group.
pub(crate) struct Transformer<'a> {
    pub(crate) accelerator: &'a Accelerator,
    pub(crate) constants: &'a Constants,
    pub(crate) row: &'a MeasuredTransformer,
}

/// Bytes of an activation's element.
const ELEMENT: f64 = 2.0;
/// GPT-2's vocabulary, padded so that every degree divides it.
pub(crate) const VOCAB: f64 = 51_200.0;

impl Transformer<'_> {
    /// Samples × tokens of a micro-batch.
    fn tokens(&self) -> f64 {
        f64::from(self.row.micro_batch) * f64::from(self.row.seq_len)
    }

    /// What a layer hands on.
    pub(crate) fn output_bytes(&self) -> f64 {
        self.tokens() * f64::from(self.row.hidden) * ELEMENT
    }

    /// Forward and backward of a block, without recompute.
    pub(crate) fn block_s(&self) -> (f64, f64) {
        let row = self.row;
        let (hidden, degree) = (f64::from(row.hidden), f64::from(row.tensor_parallel));
        let (tokens, seq_len) = (self.tokens(), f64::from(row.seq_len));
        let head = hidden / f64::from(row.heads);
        let heads = f64::from(row.micro_batch) * f64::from(row.heads) / degree;
        // Query, key and value; scores; values by scores; projection; both of the feed-forward.
        let matrices = [
            (tokens, 3.0 * hidden / degree, hidden, 1.0),
            (seq_len, seq_len, head, heads),
            (seq_len, head, seq_len, heads),
            (tokens, hidden, hidden / degree, 1.0),
            (tokens, 4.0 * hidden / degree, hidden, 1.0),
            (tokens, hidden, 4.0 * hidden / degree, 1.0),
        ];
        let (mut forward_s, mut backward_s) = (0.0, 0.0);
        for (m, n, k, batch) in matrices {
            forward_s += self.matrix_s(m, n, k, batch);
            // Gradients of the input and of the weight.
            backward_s += self.matrix_s(m, k, n, batch) + self.matrix_s(k, n, m, batch);
        }
        let scores = heads * seq_len * seq_len;
        let wide = self.output_bytes();
        let narrow = wide / degree;
        // Softmax and dropout (with a mask of a byte), two norms, two times bias, dropout and
        // residual, bias and activation on the four times wider feed-forward, two transpositions.
        forward_s += self.stream_s(4.0 * scores)
            + self.stream_s(5.0 * scores)
            + 2.0 * self.stream_s(2.0 * wide)
            + 2.0 * self.stream_s(3.5 * wide)
            + self.stream_s(8.0 * narrow)
            + self.stream_s(6.0 * narrow);
        backward_s += self.stream_s(5.0 * scores)
            + self.stream_s(6.0 * scores)
            + 2.0 * self.stream_s(4.0 * wide)
            + 2.0 * self.stream_s(2.5 * wide)
            + self.stream_s(12.0 * narrow)
            + self.stream_s(6.0 * narrow);
        let rings_s = 2.0 * self.tensor_ring_s(wide);
        (forward_s + rings_s, backward_s + rings_s)
    }

    /// Forward and backward of the projection onto the vocabulary and the loss, in single precision
    /// past the product.
    pub(crate) fn head_s(&self) -> (f64, f64) {
        let (hidden, tokens) = (f64::from(self.row.hidden), self.tokens());
        let vocab = VOCAB / f64::from(self.row.tensor_parallel);
        let forward_s = self.matrix_s(tokens, vocab, hidden, 1.0) + self.stream_s(14.0 * tokens * vocab);
        let backward_s = self.matrix_s(tokens, hidden, vocab, 1.0)
            + self.matrix_s(hidden, vocab, tokens, 1.0)
            + self.stream_s(6.0 * tokens * vocab);
        (forward_s, backward_s)
    }

    /// Seconds of a message to the next stage: each rank of the group sends its part, and the other
    /// node's ranks put the parts together.
    pub(crate) fn hop_s(&self) -> f64 {
        let (bytes, degree) = (self.output_bytes(), f64::from(self.row.tensor_parallel));
        bytes / degree / self.network_bytes_per_s()
            + bytes * (degree - 1.0) / degree / self.accelerator.ring_bytes_per_s
            + self.constants.hop_s
    }

    /// What a device's network card moves, payload a second.
    pub(crate) fn network_bytes_per_s(&self) -> f64 {
        self.accelerator.network_bytes_per_s * self.constants.network_efficiency
    }

    /// `batch` products of m × k by k × n.
    fn matrix_s(&self, m: f64, n: f64, k: f64, batch: f64) -> f64 {
        let (accelerator, constants) = (self.accelerator, self.constants);
        let [square, flat] = constants.small_tile_efficiency;
        let seconds = |(rows, columns, efficiency): (f64, f64, f64)| {
            let waves = ((m / rows).ceil() * (n / columns).ceil() * batch / accelerator.cores).ceil();
            let operations = 2.0 * rows * columns * k * accelerator.cores * waves;
            operations / (accelerator.peak_flops * constants.matrix_efficiency * efficiency)
        };
        let tiles = [(256.0, 128.0, 1.0), (128.0, 128.0, square), (128.0, 64.0, flat)];
        let compute_s = tiles.into_iter().map(seconds).fold(f64::INFINITY, f64::min);
        let bytes = ELEMENT * (m * k + k * n + m * n) * batch;
        compute_s.max(bytes / self.memory_bytes_per_s()) + constants.launch_s
    }

    fn stream_s(&self, bytes: f64) -> f64 {
        bytes / self.memory_bytes_per_s() + self.constants.launch_s
    }

    pub(crate) fn memory_bytes_per_s(&self) -> f64 {
        self.accelerator.memory_bytes_per_s * self.constants.memory_efficiency
    }

    /// An all-reduce of activations in the tensor parallel group; a group of several nodes is one
    /// ring a card through all of them.
    fn tensor_ring_s(&self, bytes: f64) -> f64 {
        let degree = f64::from(self.row.tensor_parallel);
        if self.row.tensor_parallel <= 1 {
            return 0.0;
        }
        let rate = if self.row.tensor_parallel <= self.accelerator.devices_per_node {
            self.accelerator.ring_bytes_per_s
        } else {
            self.network_bytes_per_s() * f64::from(self.accelerator.devices_per_node)
        };
        2.0 * (degree - 1.0) / degree * bytes / rate + 2.0 * (degree - 1.0) * self.constants.ring_step_s
    }
}
