//! The engine interface: what a framework must do so that its device can join.
//!
//! In-process, between a worker and a framework; not a wire. Tensors cross it as [`Lease`]s. Calls
//! answer with a [`Ticket`]; synchronous engines return finished ones. A layer is the unit: an
//! engine compiles one program for all like layers and reports each layer's gradients as soon as
//! they are final.

use std::ops::Range;
use std::time::Instant;

pub use hgct_core::check::{EngineDescription, Granularity};
use hgct_core::dtype::{DType, MemoryKind};
use hgct_core::model::ModelSpec;
use hgct_core::plan::StageId;

use crate::Result;

/// A stage instance as an engine sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct StageLoad {
    /// The stage instance.
    pub stage: StageId,
    /// The model's shape.
    pub model: ModelSpec,
    /// Its layers.
    pub layers: Range<u32>,
    /// Whether backward computes activations again.
    pub recompute: bool,
}

/// Which part of a backward to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackwardPart {
    /// Gradients of inputs and weights.
    Full,
    /// Gradients of inputs only.
    Input,
    /// Gradients of weights only.
    Weight,
}

/// Called with a layer and its final gradients, highest layer first.
pub type GradientReady<'a> = dyn FnMut(u32, Vec<Lease>) -> Result<()> + 'a;

/// A framework that drives one device.
///
/// All calls come from one thread. Methods that name a stage fail with
/// [`crate::Error::Engine`] when it is not loaded.
pub trait Engine {
    /// What it can do.
    fn describe(&self) -> &EngineDescription;

    /// Bytes that tensors take on the device now, with what is kept for backward; `None`: nobody counts
    /// them. Memory of micro-batches in flight is measured by it.
    fn tensor_bytes(&self) -> Option<u64> {
        None
    }

    /// Makes room for the stages' parameters and forgets everything before; callable again in a
    /// living process. Parameters are undefined until imported.
    fn load(&mut self, stages: &[StageLoad]) -> Result<()>;

    /// Prepares a loaded stage for micro-batches of `samples` sequences of `seq_len` tokens, such as
    /// by compiling its kernels, so that the first step takes no longer than others. Parameters are
    /// still undefined, and nothing of it may count. By default there is nothing to prepare.
    fn warm_up(&mut self, _stage: StageId, _samples: u64, _seq_len: u64) -> Result<()> {
        Ok(())
    }

    /// Copies parameters in. `name` of a lease is the tensor's; its rows begin at `first_row` of
    /// the tensor.
    fn import(&mut self, stage: StageId, rows: &[ImportRows]) -> Result<()>;

    /// Hands out current parameters, bit for bit.
    fn export(&mut self, stage: StageId, names: &[String]) -> Result<Vec<Lease>>;

    /// Sets accumulated gradients to zero.
    fn zero_gradients(&mut self, stage: StageId) -> Result<()>;

    /// Forward of one micro-batch. Inputs: `input_ids` `[b, s]` or `hidden` `[b, s, d]`, and
    /// `labels` `[b, s]` for the head's stage. Output: `hidden`, or `loss_sum` `[1]`: the sum over
    /// tokens of the cross-entropy, nats.
    fn forward(&mut self, stage: StageId, micro_batch: u32, inputs: Edge) -> Result<Ticket<Edge>>;

    /// Backward of one micro-batch; parameter gradients accumulate. `gradients` holds the output's
    /// gradient, or nothing for the head's stage, which is seeded with one. Answers with the
    /// gradient of `hidden`, or nothing from the embedding's stage. With `ready` given this is the
    /// last micro-batch, and each layer's accumulated gradients are handed out before earlier
    /// layers are computed.
    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        part: BackwardPart,
        gradients: Edge,
        ready: Option<&mut GradientReady<'_>>,
    ) -> Result<Ticket<Edge>>;

    /// Forward without a graph.
    fn evaluate(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>>;

    /// Like [`Engine::evaluate`], but the head's stage takes no labels and answers with `logits`
    /// `[b, s, v]`.
    fn logits(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>>;

    /// Forgets a micro-batch that was forwarded; its gradients never count.
    fn drop_micro_batch(&mut self, micro_batch: u32) -> Result<()>;

    /// Forgets all micro-batches in flight.
    fn abort(&mut self) -> Result<()>;
}

/// Rows of one tensor to import.
#[derive(Debug)]
pub struct ImportRows {
    /// The rows; `shape` is that of the rows, `name` the tensor's.
    pub lease: Lease,
    /// Where they begin in dimension 0 of the tensor.
    pub first_row: u64,
}

/// What one stage hands the next: named tensors over a range of positions.
#[derive(Debug, Default)]
pub struct Edge {
    /// The tensors.
    pub tensors: Vec<Lease>,
    /// First position of the sequence that they cover.
    pub first_position: u32,
}

impl Edge {
    /// An edge over whole sequences.
    pub fn new(tensors: Vec<Lease>) -> Self {
        Self { tensors, first_position: 0 }
    }

    /// Takes the tensor of that name out.
    pub fn take(&mut self, name: &str) -> Option<Lease> {
        let at = self.tensors.iter().position(|lease| lease.name == name)?;
        Some(self.tensors.swap_remove(at))
    }
}

/// Memory that crosses the interface: C-contiguous, valid until dropped.
pub struct Lease {
    /// Tensor name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Where the bytes lie.
    pub memory: MemoryKind,
    address: *const u8,
    size_bytes: usize,
    _owner: Box<dyn Send + Sync>,
}

// SAFETY: the bytes are only read through a shared reference, and `from_raw` makes its caller
// promise that nobody writes them while the lease lives, on whatever thread.
unsafe impl Send for Lease {}
// SAFETY: as above.
unsafe impl Sync for Lease {}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}{:?}", self.name, self.dtype, self.shape)
    }
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Lease {
    /// A lease of memory that `owner` keeps alive.
    ///
    /// # Safety
    /// `address` points to `size_bytes` initialised bytes of host memory that stay valid and
    /// unwritten until `owner` is dropped.
    pub unsafe fn from_raw(
        name: String,
        dtype: DType,
        shape: Vec<u64>,
        address: *const u8,
        size_bytes: usize,
        owner: Box<dyn Send + Sync>,
    ) -> Self {
        Self { name, dtype, shape, memory: MemoryKind::Host, address, size_bytes, _owner: owner }
    }

    /// A lease of bytes owned by `owner`.
    pub fn of_bytes<T: AsRef<[u8]> + Send + Sync + 'static>(
        name: impl Into<String>,
        dtype: DType,
        shape: Vec<u64>,
        owner: T,
    ) -> Self {
        let owner = Box::new(owner);
        let bytes: &[u8] = (*owner).as_ref();
        let (address, size_bytes) = (bytes.as_ptr(), bytes.len());
        // SAFETY: the box does not move its content, and `AsRef<[u8]>` of an owner that nobody else
        // can reach answers with the same bytes until it is dropped.
        unsafe { Self::from_raw(name.into(), dtype, shape, address, size_bytes, owner) }
    }

    /// A lease of f32 values.
    pub fn of_f32(name: impl Into<String>, shape: Vec<u64>, values: Vec<f32>) -> Self {
        let (address, size_bytes) = (values.as_ptr().cast(), values.len() * 4);
        // SAFETY: a vector's heap block stays where it is while the vector, moved into the owner,
        // lives, and nobody can write it.
        unsafe { Self::from_raw(name.into(), DType::F32, shape, address, size_bytes, Box::new(values)) }
    }

    /// A lease of token ids or labels.
    pub fn of_i32(name: impl Into<String>, shape: Vec<u64>, values: Vec<i32>) -> Self {
        let (address, size_bytes) = (values.as_ptr().cast(), values.len() * 4);
        // SAFETY: as in `of_f32`.
        unsafe { Self::from_raw(name.into(), DType::I32, shape, address, size_bytes, Box::new(values)) }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: promised by the caller of `from_raw`.
        unsafe { std::slice::from_raw_parts(self.address, self.size_bytes) }
    }

    /// The values, if they are f32 and aligned.
    pub fn as_f32(&self) -> Result<&[f32]> {
        if self.dtype != DType::F32
            || !self.address.addr().is_multiple_of(align_of::<f32>())
            || !self.size_bytes.is_multiple_of(4)
        {
            return Err(crate::Error::Lease {
                name: self.name.clone(),
                found: self.dtype,
                expected: DType::F32,
            });
        }
        #[allow(clippy::cast_ptr_alignment, reason = "checked above")]
        let address = self.address.cast::<f32>();
        // SAFETY: the bytes are valid (see `bytes`), aligned and whole elements (just checked);
        // every bit pattern is an f32.
        Ok(unsafe { std::slice::from_raw_parts(address, self.size_bytes / 4) })
    }

    /// Address and length, for a foreign interface.
    pub fn raw(&self) -> (*const u8, usize) {
        (self.address, self.size_bytes)
    }
}

/// The answer to a submitted call.
pub enum Ticket<T> {
    /// Finished.
    Ready(T),
    /// Under way; waits until it is finished or the deadline passes.
    Pending(Box<dyn FnOnce(Instant) -> Result<T>>),
}

impl<T> Ticket<T> {
    /// Waits for the result.
    pub fn wait(self, deadline: Instant) -> Result<T> {
        match self {
            Self::Ready(value) => Ok(value),
            Self::Pending(wait) => wait(deadline),
        }
    }
}
