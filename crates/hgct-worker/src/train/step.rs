//! The interpreter: one action after the other, as the schedule says.

use std::collections::BTreeMap;
use std::sync::Arc;

use hgct_comm::{Direction, SendBuffer, Tag, TagKind, monotonic_ns};
use hgct_core::dtype::DType;
use hgct_core::plan::{MicroBatchPlace, StageId};
use hgct_core::schedule::{Action, Operation, neighbour};
use hgct_core::timeline::{ActionSpan, TransferSpan};

use super::{Trainer, tokens};
use crate::engine::{BackwardPart, Edge, Lease};
use crate::optimizer::{self, AdamW, UpdateStep};
use crate::{Error, Result};

/// What came of a step, the same on every rank but for the last four.
#[derive(Debug, Clone)]
pub struct StepOutcome {
    /// Global sum of token losses, nats.
    pub loss_sum: f64,
    /// Global tokens.
    pub num_tokens: u64,
    /// Global norm of the mean loss's gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Loss or norm was not finite: nobody updated.
    pub skipped: bool,
    /// Some rank was asked to stop after this step.
    pub stop: bool,
    /// From the step's start to its end here.
    pub step_ns: u64,
    /// CPU time of this process inside of compute actions.
    pub compute_cpu_ns: u64,
    /// Actions of this rank.
    pub actions: Vec<ActionSpan>,
    /// Transfers of this rank.
    pub transfers: Vec<TransferSpan>,
}

/// What flows between the actions of one pass.
#[derive(Default)]
struct Flow {
    /// Inputs, outputs and gradients that wait for their action.
    edges: BTreeMap<(Slot, StageId, u32), Lease>,
    losses: BTreeMap<u32, f64>,
    compute_cpu_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Input,
    Output,
    OutputGradient,
    InputGradient,
}

/// What a pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Train,
    Evaluate,
}

/// Separates the messages of evaluation from those of training in a tag's step.
const EVALUATION: u64 = 1 << 62;

impl Trainer {
    /// Trains one step. `stop`: this rank was asked to stop after it.
    pub fn step(&mut self, step: u64, stop: bool) -> Result<StepOutcome> {
        let started = monotonic_ns();
        for stage in self.stages.clone() {
            self.engine.zero_gradients(stage)?;
        }
        let places = self.plan.micro_batches();
        let order = self.order;
        let mut flow = Flow::default();
        let mut decision = None;
        for action in self.schedule.clone() {
            let began = self.progress.begin(step, action);
            match action.operation {
                Operation::Reduce => {}
                Operation::Update => decision = Some(self.update(step, flow.losses.values().sum(), stop)?),
                Operation::Gather => {
                    if decision.as_ref().is_some_and(|d: &Decision| !d.skipped) {
                        let deadline = self.deadline();
                        self.exchange.gather(
                            action.stage,
                            &self.owned,
                            self.engine.as_mut(),
                            self.comm.as_ref(),
                            step + 1,
                            deadline,
                        )?;
                    }
                }
                _ => {
                    let samples = |place: &MicroBatchPlace| order.samples(step, place.samples.clone());
                    self.pass(Pass::Train, step, action, &places, &samples, &mut flow)?;
                }
            }
            self.progress.end(step, action, began);
        }
        self.exchange.end_step();
        let decision = decision.ok_or_else(|| self.protocol("the schedule has no update"))?;
        Ok(StepOutcome {
            loss_sum: decision.loss_sum,
            num_tokens: self.num_tokens(),
            grad_norm: decision.grad_norm,
            learning_rate: decision.learning_rate,
            skipped: decision.skipped,
            stop: decision.stop,
            step_ns: monotonic_ns() - started,
            compute_cpu_ns: flow.compute_cpu_ns,
            actions: self.progress.take_spans(),
            transfers: self.take_transfers(step),
        })
    }

    /// Sum of token losses and tokens over the first held-out samples (as many whole global batches
    /// as `evaluate_samples` has, one at least), the same on every rank.
    pub fn evaluate(&mut self, step: u64) -> Result<Option<(f64, u64)>> {
        let Some(held_out) = &self.held_out else { return Ok(None) };
        let available = held_out.samples(self.plan.seq_len)?.len();
        let batch = u64::from(self.plan.global_batch);
        let rounds = (self.recipe.evaluate_samples.min(available) / batch).max(1);
        let places = self.plan.micro_batches();
        let mut loss = 0.0;
        for round in 0..rounds {
            let mut flow = Flow::default();
            let samples = |place: &MicroBatchPlace| {
                place.samples.clone().map(|position| (round * batch + position) % available).collect()
            };
            for action in self.evaluation.clone() {
                let began = if self.has_evaluated {
                    self.progress.begin(step, action)
                } else {
                    self.progress.begin_untold(step, action)
                };
                self.pass(
                    Pass::Evaluate,
                    EVALUATION | (step << 20) | round,
                    action,
                    &places,
                    &samples,
                    &mut flow,
                )?;
                self.progress.end(step, action, began);
            }
            // Every shape has come by in a round.
            self.has_evaluated = true;
            loss += flow.losses.values().sum::<f64>();
        }
        let mut sums = [loss];
        self.progress.outside(true);
        self.all_reduce(&mut sums)?;
        self.progress.rest();
        // Evaluation is no part of a step's timeline.
        self.progress.take_spans();
        self.take_transfers(step);
        Ok(Some((sums[0], rounds * self.num_tokens())))
    }

    fn pass(
        &mut self,
        pass: Pass,
        tag_step: u64,
        action: Action,
        places: &[MicroBatchPlace],
        samples: &dyn Fn(&MicroBatchPlace) -> Vec<u64>,
        flow: &mut Flow,
    ) -> Result<()> {
        let Action { stage, operation, micro_batch } = action;
        match operation {
            Operation::RecvActivation => self.receive(stage, micro_batch, tag_step, true, places, flow),
            Operation::RecvGradient => self.receive(stage, micro_batch, tag_step, false, places, flow),
            Operation::SendActivation => self.send(stage, micro_batch, tag_step, true, flow),
            Operation::SendGradient => self.send(stage, micro_batch, tag_step, false, flow),
            Operation::Forward => {
                let ids = samples(&places[micro_batch as usize]);
                let cpu = process_cpu_ns();
                let result = self.forward(pass, stage, micro_batch, &ids, flow);
                flow.compute_cpu_ns += process_cpu_ns() - cpu;
                result
            }
            Operation::Backward => {
                let cpu = process_cpu_ns();
                let result = self.backward(stage, micro_batch, tag_step, flow);
                flow.compute_cpu_ns += process_cpu_ns() - cpu;
                result
            }
            other => Err(self.protocol(format!("{other:?} cannot be executed yet"))),
        }
    }

    fn forward(
        &mut self,
        pass: Pass,
        stage: StageId,
        micro_batch: u32,
        ids: &[u64],
        flow: &mut Flow,
    ) -> Result<()> {
        let layers = self.plan.stage(stage).layers();
        let (first, last) = (layers.start == 0, layers.end == self.plan.model.num_placeable_layers());
        let mut edge = Edge::default();
        if first || last {
            let file = match pass {
                Pass::Train => Some(&self.train),
                Pass::Evaluate => self.held_out.as_ref(),
            };
            let Some(file) = file else { return Err(self.protocol("no held-out tokens")) };
            let (inputs, labels) = tokens::micro_batch(&file.samples(self.plan.seq_len)?, ids)?;
            if first {
                edge.tensors.push(inputs);
            }
            if last {
                edge.tensors.push(labels);
            }
        }
        if !first {
            edge.tensors.push(self.taken(flow, Slot::Input, stage, micro_batch)?);
        }
        let ticket = match pass {
            Pass::Train => self.engine.forward(stage, micro_batch, edge)?,
            Pass::Evaluate => self.engine.evaluate(stage, edge)?,
        };
        let mut output = ticket.wait(std::time::Instant::now() + self.step_deadline)?;
        let name = if last { "loss_sum" } else { "hidden" };
        let lease = output.take(name).ok_or_else(|| self.missing("forward", name))?;
        if last {
            let loss = lease.as_f32()?.first().copied().ok_or_else(|| self.missing("forward", name))?;
            flow.losses.insert(micro_batch, f64::from(loss));
        } else {
            flow.edges.insert((Slot::Output, stage, micro_batch), lease);
        }
        Ok(())
    }

    fn backward(&mut self, stage: StageId, micro_batch: u32, step: u64, flow: &mut Flow) -> Result<()> {
        let layers = self.plan.stage(stage).layers();
        let (first, last) = (layers.start == 0, layers.end == self.plan.model.num_placeable_layers());
        let mut gradients = Edge::default();
        if !last {
            let mut lease = self.taken(flow, Slot::OutputGradient, stage, micro_batch)?;
            lease.name = "hidden".into();
            gradients.tensors.push(lease);
        }
        let is_last = self.is_last_backward(stage, micro_batch);
        let deadline = self.deadline();
        let Self { engine, exchange, comm, .. } = self;
        let mut ready = |layer: u32, leases: Vec<Lease>| {
            exchange.offer(stage, layer, leases, comm.as_ref(), step, deadline)
        };
        let ready: Option<&mut crate::engine::GradientReady<'_>> =
            if is_last { Some(&mut ready) } else { None };
        let ticket = engine.backward(stage, micro_batch, BackwardPart::Full, gradients, ready)?;
        let mut output = ticket.wait(std::time::Instant::now() + self.step_deadline)?;
        if !first {
            let lease = output.take("hidden").ok_or_else(|| self.missing("backward", "hidden"))?;
            flow.edges.insert((Slot::InputGradient, stage, micro_batch), lease);
        }
        Ok(())
    }

    fn is_last_backward(&self, stage: StageId, micro_batch: u32) -> bool {
        let last =
            self.schedule.iter().rev().find(|a| a.stage == stage && a.operation == Operation::Backward);
        last.is_some_and(|action| action.micro_batch == micro_batch)
    }

    fn send(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        step: u64,
        forward: bool,
        flow: &mut Flow,
    ) -> Result<()> {
        let to =
            neighbour(&self.plan, stage, !forward).ok_or_else(|| self.protocol("no neighbour to send to"))?;
        let (from_slot, to_slot, kind) = if forward {
            (Slot::Output, Slot::Input, TagKind::Activation)
        } else {
            (Slot::InputGradient, Slot::OutputGradient, TagKind::ActivationGradient)
        };
        let lease = self.taken(flow, from_slot, stage, micro_batch)?;
        let rank = self.plan.stage(to).rank();
        if rank == self.rank {
            flow.edges.insert((to_slot, to, micro_batch), lease);
            return Ok(());
        }
        let tag = Tag::new(kind, to.0, micro_batch, step);
        self.send_to(rank, tag, SendBuffer::lease(Arc::new(lease)))
    }

    fn receive(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        step: u64,
        forward: bool,
        places: &[MicroBatchPlace],
        flow: &mut Flow,
    ) -> Result<()> {
        let from = neighbour(&self.plan, stage, forward)
            .ok_or_else(|| self.protocol("no neighbour to receive from"))?;
        let (slot, kind) = if forward {
            (Slot::Input, TagKind::Activation)
        } else {
            (Slot::OutputGradient, TagKind::ActivationGradient)
        };
        let rank = self.plan.stage(from).rank();
        if rank == self.rank {
            return Ok(());
        }
        let message = self.recv_from(rank, Tag::new(kind, stage.0, micro_batch, step))?;
        let samples = &places[micro_batch as usize].samples;
        let shape = vec![
            samples.end - samples.start,
            u64::from(self.plan.seq_len),
            u64::from(self.plan.model.hidden_size),
        ];
        let expected = 4 * shape.iter().product::<u64>();
        if message.len() as u64 != expected {
            return Err(self.protocol(format!(
                "{} from {rank} has {} bytes, expected {expected}",
                message.tag(),
                message.len()
            )));
        }
        flow.edges.insert((slot, stage, micro_batch), Lease::of_bytes("hidden", DType::F32, shape, message));
        Ok(())
    }

    /// Adds what this rank owns, decides with all others whether the step counts, and updates.
    fn update(&mut self, step: u64, loss_sum: f64, stop: bool) -> Result<Decision> {
        let deadline = self.deadline();
        for group in &mut self.owned.groups {
            self.exchange.reduce(group, self.comm.as_ref(), step, deadline)?;
        }
        let mut scalars = vec![loss_sum, f64::from(u8::from(stop))];
        scalars.extend(self.owned.block_norms());
        self.all_reduce(&mut scalars)?;
        let (loss_sum, stop, norms) = (scalars[0], scalars[1] > 0.0, &scalars[2..]);
        let tokens = self.num_tokens() as f64;
        let grad_norm = optimizer::sum_in_tree(norms).sqrt() / tokens;
        let learning_rate = self.recipe.learning_rate_at(step);
        let skipped = !(loss_sum.is_finite() && grad_norm.is_finite());
        if skipped {
            self.owned.forget_gradients();
        } else {
            self.num_updates += 1;
            let update = UpdateStep {
                number: self.num_updates,
                learning_rate,
                scale: 1.0 / tokens,
                clip_factor: optimizer::clip_factor(grad_norm, self.recipe.clip),
            };
            self.owned.update(&AdamW::from(&self.recipe), &update);
            self.exchange.send_parameters(&self.owned, self.comm.as_ref(), step + 1, deadline)?;
        }
        Ok(Decision { loss_sum, grad_norm, learning_rate, skipped, stop })
    }

    /// Adds over all ranks in rank order; the same bits everywhere.
    pub(super) fn all_reduce(&mut self, values: &mut [f64]) -> Result<()> {
        self.collectives += 1;
        let deadline = self.deadline();
        if let Some(comm) = &self.comm {
            comm.all_reduce_scalars(hgct_comm::ScalarOp::Sum, values, self.collectives, deadline)?;
        }
        Ok(())
    }

    fn num_tokens(&self) -> u64 {
        u64::from(self.plan.global_batch) * u64::from(self.plan.seq_len)
    }

    fn take_transfers(&self, step: u64) -> Vec<TransferSpan> {
        let records = self.comm.as_ref().map(|comm| comm.drain_transfers().0).unwrap_or_default();
        let spans = records.into_iter().map(|record| TransferSpan {
            step,
            peer: record.peer,
            outgoing: record.direction == Direction::Send,
            size_bytes: record.bytes,
            start_ns: if record.direction == Direction::Send { record.queued_ns } else { record.start_ns },
            end_ns: record.end_ns,
        });
        spans.collect()
    }

    fn taken(&self, flow: &mut Flow, slot: Slot, stage: StageId, micro_batch: u32) -> Result<Lease> {
        flow.edges.remove(&(slot, stage, micro_batch)).ok_or_else(|| {
            self.protocol(format!("{slot:?} of micro-batch {micro_batch} of {stage} is not there"))
        })
    }

    fn missing(&self, operation: &'static str, missing: &'static str) -> Error {
        Error::Answer { engine: self.engine.describe().engine.clone(), operation, missing }
    }
}

/// What all ranks agreed on.
struct Decision {
    loss_sum: f64,
    grad_norm: f64,
    learning_rate: f64,
    skipped: bool,
    stop: bool,
}

/// CPU time of this process, all threads.
fn process_cpu_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
