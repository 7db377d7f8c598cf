//! A plan's step as straight lists of timed instructions, one a rank.
//!
//! The schedule's actions become runs of CPU time, sends, waits and one barrier: forwards and
//! backwards from the cost model; in a stage's last backward each layer's gradients leave as soon
//! as they are final; `UPDATE` waits for the contributions of what the rank owns, adds them, meets
//! all ranks in the scalar all-reduce of the squared norm, updates group by group and sends each
//! group's new parameters to its other holders; `GATHER` waits for and imports a stage's parameters.

use hgct_core::plan::{OwnedGroup, Plan, StageId};
use hgct_core::schedule::{Action, Operation, Schedule, neighbour};

use crate::cost::{Costs, ELEMENT_BYTES, ModelShape};
use crate::{Error, Result};

/// What is priced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pricing {
    /// Wire time, latency and the CPU time of sending and receiving.
    pub communication: bool,
    /// Adding, updating and importing.
    pub exchange_work: bool,
}

impl Pricing {
    /// Everything.
    pub const ALL: Self = Self { communication: true, exchange_work: true };
    /// A dry run of the actions in which nothing needs time to cross.
    pub const FREE_COMMUNICATION: Self = Self { communication: false, exchange_work: true };
    /// Forwards and backwards alone.
    pub const COMPUTE: Self = Self { communication: false, exchange_work: false };
}

/// Slices with the same owner and holders, as numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) owner: usize,
    pub(crate) elements: u64,
    /// Stage instance and the layer whose backward makes its gradient final.
    pub(crate) holders: Vec<(u32, u32)>,
}

impl Group {
    pub(crate) fn of(group: &OwnedGroup) -> Self {
        Self {
            owner: group.owner.index(),
            elements: group.num_elements(),
            holders: group.holders.iter().map(|holder| (holder.stage.0, holder.layer)).collect(),
        }
    }
}

/// One thing that a rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instruction {
    Begin(Action),
    End,
    Run(u64),
    Send(u32),
    Wait(u32),
    Barrier,
}

/// What crosses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) bytes: u64,
    /// CPU time of the sender and of the receiver.
    pub(crate) send_ns: u64,
    pub(crate) receive_ns: u64,
    pub(crate) occupied_ns: u64,
    pub(crate) latency_ns: u64,
}

/// A step, compiled.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) ranks: Vec<Vec<Instruction>>,
    pub(crate) messages: Vec<Message>,
    /// From the last rank's arrival at the barrier to everybody's release.
    pub(crate) barrier_ns: u64,
}

impl Program {
    /// Busy time of the busiest rank: no execution is faster.
    pub(crate) fn roofline_ns(&self) -> u64 {
        let mut busy: Vec<u64> = self.ranks.iter().map(|list| runs(list)).collect();
        for message in &self.messages {
            busy[message.from as usize] += message.send_ns;
            busy[message.to as usize] += message.receive_ns;
        }
        busy.into_iter().max().unwrap_or(0)
    }

    /// Everything one after another: no sensible execution is slower.
    pub(crate) fn serial_ns(&self) -> u64 {
        let runs: u64 = self.ranks.iter().map(|list| runs(list)).sum();
        let crossing: u64 =
            self.messages.iter().map(|m| m.send_ns + m.occupied_ns + m.latency_ns + 2 * m.receive_ns).sum();
        runs + crossing + self.barrier_ns
    }
}

fn runs(list: &[Instruction]) -> u64 {
    list.iter().map(|i| if let Instruction::Run(ns) = i { *ns } else { 0 }).sum()
}

/// Compiles a step. `plan` needs no owners and no hash: `groups` and `schedule` stand for them.
/// `costs` are in rank order.
pub(crate) fn compile(
    plan: &Plan,
    schedule: &Schedule,
    groups: &[Group],
    shape: &ModelShape,
    costs: &Costs,
    pricing: Pricing,
) -> Result<Program> {
    let num_stages = plan.stages.len();
    let mut compiler = Compiler {
        plan,
        shape,
        costs,
        pricing,
        groups,
        stages: stage_costs(plan, shape, costs)?,
        edges: vec![Vec::new(); num_stages],
        contributions: vec![Vec::new(); groups.len()],
        parameters: vec![Vec::new(); groups.len()],
        messages: Vec::new(),
        last_backward: last_backwards(plan, schedule),
    };
    compiler.number_messages();
    let mut ranks = Vec::with_capacity(schedule.ranks.len());
    for (rank, list) in schedule.ranks.iter().enumerate() {
        let mut out = Vec::with_capacity(list.len() * 4);
        for action in list {
            out.push(Instruction::Begin(*action));
            compiler.action(rank, *action, &mut out);
            out.push(Instruction::End);
        }
        ranks.push(out);
    }
    let most_latency = costs.links.iter().flatten().map(|link| link.latency_ns).max().unwrap_or(0);
    let barrier_ns = if pricing.communication && ranks.len() > 1 { 2 * most_latency } else { 0 };
    Ok(Program { ranks, messages: compiler.messages, barrier_ns })
}

/// Times of a stage instance.
struct StageCost {
    rank: usize,
    micro_batch: u32,
    /// First plan-wide id of its pipeline's micro-batches.
    first_micro_batch: u32,
    previous: Option<usize>,
    next: Option<usize>,
    forward_ns: u64,
    backward_ns: u64,
    /// Before the first layer of a backward: overhead, and the forward again.
    before_backward_ns: u64,
    layer_backward_ns: [u64; 3],
}

fn stage_costs(plan: &Plan, shape: &ModelShape, costs: &Costs) -> Result<Vec<StageCost>> {
    let mut pipeline_of = vec![0; plan.stages.len()];
    for (index, pipeline) in plan.pipelines.iter().enumerate() {
        for id in &pipeline.stages {
            pipeline_of[id.index()] = index;
        }
    }
    let stage = |(index, stage): (usize, &hgct_core::plan::StageInstance)| {
        let rank = stage.rank().index();
        let device = &costs.devices[rank];
        let micro_batch = plan.pipelines[pipeline_of[index]].micro_batch;
        let size = device.size(micro_batch).ok_or_else(|| Error::NotMeasured {
            device: plan.ranks[rank].device.clone(),
            detail: format!(" for micro-batches of {micro_batch}"),
        })?;
        let counts = shape.counts(&stage.layers());
        let forward = size.forward(counts);
        let again = if stage.recompute { forward } else { 0 };
        let id = StageId(index as u32);
        Ok(StageCost {
            rank,
            micro_batch,
            first_micro_batch: plan.micro_batches_of(pipeline_of[index]).start,
            previous: neighbour(plan, id, true).map(StageId::index),
            next: neighbour(plan, id, false).map(StageId::index),
            forward_ns: device.action_overhead_ns + forward,
            backward_ns: device.action_overhead_ns + again + size.backward(counts),
            before_backward_ns: device.action_overhead_ns + again,
            layer_backward_ns: size.backward_ns,
        })
    };
    plan.stages.iter().enumerate().map(stage).collect()
}

/// Of each stage, the micro-batch of its last backward.
fn last_backwards(plan: &Plan, schedule: &Schedule) -> Vec<Option<u32>> {
    let mut last = vec![None; plan.stages.len()];
    for action in schedule.ranks.iter().flatten().filter(|a| a.operation == Operation::Backward) {
        last[action.stage.index()] = Some(action.micro_batch);
    }
    last
}

struct Compiler<'a> {
    plan: &'a Plan,
    shape: &'a ModelShape,
    costs: &'a Costs,
    pricing: Pricing,
    groups: &'a [Group],
    stages: Vec<StageCost>,
    /// By receiving stage: message of the activation and of the gradient of each micro-batch,
    /// counted from the pipeline's first.
    edges: Vec<Vec<[u32; 2]>>,
    /// By group: message of each holder that is not on the owner's rank.
    contributions: Vec<Vec<(u32, u32)>>,
    /// By group: message to each other rank.
    parameters: Vec<Vec<(usize, u32)>>,
    messages: Vec<Message>,
    last_backward: Vec<Option<u32>>,
}

impl Compiler<'_> {
    fn message(&mut self, from: usize, to: usize, bytes: u64) -> u32 {
        let free = !self.pricing.communication || from == to;
        let link = self.costs.links[from][to];
        let price = |ns: u64| if free { 0 } else { ns };
        self.messages.push(Message {
            from: from as u32,
            to: to as u32,
            bytes,
            send_ns: price(self.costs.devices[from].send_ns(bytes)),
            receive_ns: price(self.costs.devices[to].send_ns(bytes)),
            occupied_ns: price(link.occupied_ns(bytes)),
            latency_ns: price(link.latency_ns),
        });
        self.messages.len() as u32 - 1
    }

    fn number_messages(&mut self) {
        for (index, pipeline) in self.plan.pipelines.iter().enumerate() {
            let num = self.plan.micro_batches_of(index).len();
            for id in &pipeline.stages {
                let (to, at) = (self.stages[id.index()].rank, id.index());
                let bytes = self.shape.edge_bytes_per_sample * u64::from(pipeline.micro_batch);
                let from = |stage: Option<usize>| stage.map(|s| self.stages[s].rank);
                let (previous, next) = (from(self.stages[at].previous), from(self.stages[at].next));
                let mut edges = Vec::with_capacity(num);
                for _ in 0..num {
                    let mut one = |from: Option<usize>| match from {
                        Some(from) => self.message(from, to, bytes),
                        None => u32::MAX,
                    };
                    edges.push([one(previous), one(next)]);
                }
                self.edges[at] = edges;
            }
        }
        for (g, group) in self.groups.iter().enumerate() {
            let bytes = group.elements * ELEMENT_BYTES;
            for (stage, _) in &group.holders {
                let rank = self.stages[*stage as usize].rank;
                if rank == group.owner {
                    continue;
                }
                let gradient = self.message(rank, group.owner, bytes);
                self.contributions[g].push((*stage, gradient));
                if !self.parameters[g].iter().any(|(known, _)| *known == rank) {
                    let parameter = self.message(group.owner, rank, bytes);
                    self.parameters[g].push((rank, parameter));
                }
            }
        }
    }

    /// Message with which `stage` gets its input of kind `gradient` for a micro-batch.
    fn edge(&self, stage: usize, micro_batch: u32, gradient: bool) -> u32 {
        let at = micro_batch - self.stages[stage].first_micro_batch;
        self.edges[stage][at as usize][usize::from(gradient)]
    }

    fn work(&self, ns: u64) -> Instruction {
        Instruction::Run(if self.pricing.exchange_work { ns } else { 0 })
    }

    fn action(&self, rank: usize, action: Action, out: &mut Vec<Instruction>) {
        let at = action.stage.index();
        let stage = &self.stages[at];
        let micro_batch = action.micro_batch;
        debug_assert!(stage.micro_batch > 0);
        match action.operation {
            Operation::Forward => out.push(Instruction::Run(stage.forward_ns)),
            Operation::Backward if self.last_backward[at] == Some(micro_batch) => self.last(at, out),
            Operation::Backward | Operation::BackwardInput | Operation::BackwardWeight => {
                out.push(Instruction::Run(stage.backward_ns));
            }
            Operation::RecvActivation => out.push(Instruction::Wait(self.edge(at, micro_batch, false))),
            Operation::RecvGradient => out.push(Instruction::Wait(self.edge(at, micro_batch, true))),
            Operation::SendActivation => {
                out.extend(stage.next.map(|to| Instruction::Send(self.edge(to, micro_batch, false))));
            }
            Operation::SendGradient => {
                out.extend(stage.previous.map(|to| Instruction::Send(self.edge(to, micro_batch, true))));
            }
            Operation::Reduce => {}
            Operation::Update => self.update(rank, out),
            Operation::Gather => self.gather(rank, at, out),
        }
    }

    /// The last backward of a stage: layer by layer, each sending what it made final.
    fn last(&self, at: usize, out: &mut Vec<Instruction>) {
        let stage = &self.stages[at];
        out.push(Instruction::Run(stage.before_backward_ns));
        for layer in self.plan.stages[at].layers().rev() {
            out.push(Instruction::Run(stage.layer_backward_ns[self.shape.kind(layer)]));
            for (g, group) in self.groups.iter().enumerate() {
                if group.holders.contains(&(at as u32, layer)) {
                    let message = self.contributions[g].iter().find(|(s, _)| *s as usize == at);
                    out.extend(message.map(|(_, m)| Instruction::Send(*m)));
                }
            }
        }
    }

    fn update(&self, rank: usize, out: &mut Vec<Instruction>) {
        let device = &self.costs.devices[rank];
        // Gradients of high layers are final first.
        for (g, group) in self.groups.iter().enumerate().rev().filter(|(_, g)| g.owner == rank) {
            out.extend(self.contributions[g].iter().map(|(_, m)| Instruction::Wait(*m)));
            out.push(self.work(device.reduce_ns(group.elements, group.holders.len() as u64)));
        }
        out.push(Instruction::Barrier);
        for (g, group) in self.groups.iter().enumerate().filter(|(_, g)| g.owner == rank) {
            out.push(self.work(device.update_ns(group.elements)));
            out.extend(self.parameters[g].iter().map(|(_, m)| Instruction::Send(*m)));
        }
    }

    fn gather(&self, rank: usize, at: usize, out: &mut Vec<Instruction>) {
        for (g, group) in self.groups.iter().enumerate() {
            if !group.holders.iter().any(|(stage, _)| *stage as usize == at) {
                continue;
            }
            let message = self.parameters[g].iter().find(|(to, _)| *to == rank);
            out.extend(message.map(|(_, m)| Instruction::Wait(*m)));
            out.push(self.work(self.costs.devices[rank].import_ns(group.elements)));
        }
    }
}
