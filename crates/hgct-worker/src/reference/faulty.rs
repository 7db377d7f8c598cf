//! An engine that is wrong in one known way.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use hgct_core::plan::StageId;

use crate::engine::{
    BackwardPart, Edge, Engine, EngineDescription, GradientReady, ImportRows, Lease, StageLoad, Ticket,
};
use crate::{Error, Result};

/// Bytes that [`Fault::GrowingMemory`] keeps at each forward.
const LEAK_BYTES: usize = 128 << 10;

/// Tokens of a micro-batch that [`Fault::SmallMemory`] still takes.
pub const SMALL_MEMORY_TOKENS: u64 = 32;

/// One way to be wrong. Most were seen in public reports about frameworks and their plug-ins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Gradients of a stage's first layer are half of what they must be; the loss is right.
    HalfFirstLayerGradient,
    /// Every forward keeps memory for ever.
    GrowingMemory,
    /// The same inputs give other bits.
    Nondeterministic,
    /// Backward takes the newest micro-batch, whichever is asked for.
    LifoOnly,
    /// Hidden states are off by a thousandth.
    WrongOperator,
    /// Backward never ends.
    Hang,
    /// Forward panics.
    Panic,
    /// Exported parameters lose their last bits.
    RoundedExport,
    /// Gradients of dropped micro-batches count.
    KeepsDropped,
    /// Gradients are off where activations are computed again.
    WrongRecompute,
    /// Gradients are never set to zero.
    KeepsGradients,
    /// Only the first load does anything.
    LoadsOnce,
    /// Each layer reports its gradients twice.
    ReportsTwice,
    /// Logits come from another position.
    ShiftedLogits,
    /// Forward fails above [`SMALL_MEMORY_TOKENS`] tokens, as a device that is full does.
    SmallMemory,
}

/// Wraps an engine and makes it wrong.
pub struct FaultyEngine<E> {
    inner: E,
    fault: Fault,
    layers: BTreeMap<StageId, Range<u32>>,
    recompute: bool,
    num_forwards: u32,
    /// Micro-batches in flight in the order of their forwards, with their output's shape.
    in_flight: Vec<(StageId, u32, Vec<u64>)>,
    kept: Vec<Vec<u8>>,
}

impl<E: Engine> FaultyEngine<E> {
    /// `inner` with a fault.
    pub fn new(inner: E, fault: Fault) -> Self {
        Self {
            inner,
            fault,
            layers: BTreeMap::new(),
            recompute: false,
            num_forwards: 0,
            in_flight: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Which micro-batch a backward really takes.
    fn taken(&mut self, stage: StageId, micro_batch: u32) -> u32 {
        let newest = self.fault == Fault::LifoOnly;
        let at = self.in_flight.iter().rposition(|(s, m, _)| *s == stage && (newest || *m == micro_batch));
        at.map_or(micro_batch, |at| self.in_flight.remove(at).1)
    }
}

impl<E: Engine> Engine for FaultyEngine<E> {
    fn describe(&self) -> &EngineDescription {
        self.inner.describe()
    }

    fn load(&mut self, stages: &[StageLoad]) -> Result<()> {
        if self.fault == Fault::LoadsOnce && !self.layers.is_empty() {
            return Ok(());
        }
        self.in_flight.clear();
        self.layers = stages.iter().map(|load| (load.stage, load.layers.clone())).collect();
        self.recompute = stages.iter().any(|load| load.recompute);
        self.inner.load(stages)
    }

    fn import(&mut self, stage: StageId, rows: &[ImportRows]) -> Result<()> {
        self.inner.import(stage, rows)
    }

    fn export(&mut self, stage: StageId, names: &[String]) -> Result<Vec<Lease>> {
        let leases = self.inner.export(stage, names)?;
        let rounded = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        if self.fault == Fault::RoundedExport {
            leases.iter().map(|l| map(l, rounded)).collect()
        } else {
            Ok(leases)
        }
    }

    fn zero_gradients(&mut self, stage: StageId) -> Result<()> {
        if self.fault == Fault::KeepsGradients { Ok(()) } else { self.inner.zero_gradients(stage) }
    }

    fn forward(&mut self, stage: StageId, micro_batch: u32, inputs: Edge) -> Result<Ticket<Edge>> {
        self.num_forwards += 1;
        if self.fault == Fault::GrowingMemory {
            self.kept.push(vec![1; LEAK_BYTES]);
        }
        assert!(self.fault != Fault::Panic, "the fault that was asked for");
        let tokens = inputs.tensors.first().map_or(0, |lease| lease.shape.iter().take(2).product::<u64>());
        if self.fault == Fault::SmallMemory && tokens > SMALL_MEMORY_TOKENS {
            let message = format!("{tokens} tokens do not fit");
            return Err(Error::Engine { engine: "faulty".into(), operation: "forward", message });
        }
        let output = answer(self.inner.forward(stage, micro_batch, inputs)?)?;
        let shape = output.tensors.first().map(|lease| lease.shape.clone()).unwrap_or_default();
        self.in_flight.push((stage, micro_batch, shape));
        let jitter = 1.0 + 3e-7 * (self.num_forwards % 7) as f32;
        let hidden = output.tensors.iter().any(|lease| lease.name == "hidden");
        match self.fault {
            Fault::Nondeterministic => map_edge(&output, |x| x * jitter),
            Fault::WrongOperator if hidden => map_edge(&output, |x| x * 1.001),
            _ => Ok(Ticket::Ready(output)),
        }
    }

    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        part: BackwardPart,
        gradients: Edge,
        ready: Option<&mut GradientReady<'_>>,
    ) -> Result<Ticket<Edge>> {
        if self.fault == Fault::Hang {
            return Ok(Ticket::Pending(Box::new(hang)));
        }
        let micro_batch = self.taken(stage, micro_batch);
        let first = self.layers.get(&stage).map_or(0, |layers| layers.start);
        let fault = self.fault;
        let output = match ready {
            None => self.inner.backward(stage, micro_batch, part, gradients, None)?,
            Some(ready) => {
                let mut wrapped = |layer: u32, leases: Vec<Lease>| {
                    if fault == Fault::HalfFirstLayerGradient && layer == first {
                        return ready(
                            layer,
                            leases.iter().map(|l| map(l, |x| x * 0.5)).collect::<Result<_>>()?,
                        );
                    }
                    if fault == Fault::ReportsTwice {
                        ready(layer, leases.iter().map(|l| map(l, |x| x)).collect::<Result<_>>()?)?;
                    }
                    ready(layer, leases)
                };
                self.inner.backward(stage, micro_batch, part, gradients, Some(&mut wrapped))?
            }
        };
        let output = answer(output)?;
        if fault == Fault::WrongRecompute && self.recompute {
            return map_edge(&output, |x| x * 0.99);
        }
        Ok(Ticket::Ready(output))
    }

    fn evaluate(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        self.inner.evaluate(stage, inputs)
    }

    fn logits(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        let output = answer(self.inner.logits(stage, inputs)?)?;
        if self.fault != Fault::ShiftedLogits {
            return Ok(Ticket::Ready(output));
        }
        let shift = |lease: &Lease| {
            let mut values = lease.as_f32()?.to_vec();
            values.rotate_left(lease.shape.last().map_or(0, |width| *width as usize));
            Ok(Lease::of_f32(&lease.name, lease.shape.clone(), values))
        };
        Ok(Ticket::Ready(Edge::new(output.tensors.iter().map(shift).collect::<Result<_>>()?)))
    }

    fn drop_micro_batch(&mut self, micro_batch: u32) -> Result<()> {
        let (dropped, kept) =
            std::mem::take(&mut self.in_flight).into_iter().partition(|(_, m, _)| *m == micro_batch);
        self.in_flight = kept;
        if self.fault != Fault::KeepsDropped {
            return self.inner.drop_micro_batch(micro_batch);
        }
        let dropped: Vec<(StageId, u32, Vec<u64>)> = dropped;
        for (stage, micro_batch, shape) in dropped {
            let ones = vec![1.0; shape.iter().product::<u64>() as usize];
            let gradient = Edge::new(vec![Lease::of_f32("hidden", shape, ones)]);
            answer(self.inner.backward(stage, micro_batch, BackwardPart::Full, gradient, None)?)?;
        }
        Ok(())
    }

    fn abort(&mut self) -> Result<()> {
        self.in_flight.clear();
        self.inner.abort()
    }
}

/// Waits until the caller gives up.
fn hang(deadline: Instant) -> Result<Edge> {
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::park_timeout(left);
    }
    let message = "no answer before the deadline".into();
    Err(Error::Engine { engine: "faulty".into(), operation: "backward", message })
}

/// The answer of an engine that finishes before it returns.
fn answer(ticket: Ticket<Edge>) -> Result<Edge> {
    ticket.wait(Instant::now())
}

fn map_edge(edge: &Edge, of: impl Fn(f32) -> f32 + Copy) -> Result<Ticket<Edge>> {
    Ok(Ticket::Ready(Edge::new(edge.tensors.iter().map(|lease| map(lease, of)).collect::<Result<_>>()?)))
}

fn map(lease: &Lease, of: impl Fn(f32) -> f32) -> Result<Lease> {
    let values = lease.as_f32()?.iter().map(|x| of(*x)).collect();
    Ok(Lease::of_f32(&lease.name, lease.shape.clone(), values))
}
