//! Discrete-event simulation of a plan into a timeline: the same schedule that workers interpret.
//!
//! A rank's CPU does one thing at a time: what it takes to send or receive is taken from its
//! compute, or done while it waits. Sends are queued, receives block; a directed link carries one
//! message at a time, and a message is there one latency after its last byte left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hgct_core::model::ModelSpec;
use hgct_core::plan::Plan;
use hgct_core::profile::Profile;
use hgct_core::schedule::Schedule;
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline, TimelineSource, TransferSpan};

use crate::cost::{Costs, ModelShape};
pub use crate::program::Pricing;
use crate::program::{Group, Instruction, Message, Program, compile};
use crate::{Error, Result};

/// What a simulation says of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// One steady step.
    pub step_ns: u64,
    /// Busy time of the busiest rank: the step is never shorter.
    pub roofline_ns: u64,
    /// Everything one after another: the step is never longer.
    pub serial_ns: u64,
    /// The steady step, from its first action on.
    pub timeline: Timeline,
}

/// Simulates a plan under a profile.
pub fn simulate(plan: &Plan, profile: &Profile) -> Result<Simulation> {
    simulate_priced(plan, profile, Pricing::ALL)
}

/// The same with communication that costs nothing: what the schedule and the work alone allow.
pub fn simulate_free_communication(plan: &Plan, profile: &Profile) -> Result<Simulation> {
    simulate_priced(plan, profile, Pricing::FREE_COMMUNICATION)
}

/// Simulates with the stated things priced.
pub fn simulate_priced(plan: &Plan, profile: &Profile, pricing: Pricing) -> Result<Simulation> {
    let shape = shape_of(&plan.model, plan.seq_len);
    let costs = Costs::new(profile, plan.ranks.iter().map(|rank| &rank.device))?;
    let groups: Vec<Group> = plan.owners.iter().map(Group::of).collect();
    let program = compile(plan, &Schedule::of(plan)?, &groups, &shape, &costs, pricing)?;
    let mut spans = vec![RankSpans::default(); plan.ranks.len()];
    let step_ns = run(&program, Some(&mut spans))?;
    Ok(Simulation {
        step_ns,
        roofline_ns: program.roofline_ns(),
        serial_ns: program.serial_ns(),
        timeline: timeline(plan, spans),
    })
}

fn shape_of(model: &ModelSpec, seq_len: u32) -> ModelShape {
    ModelShape::new(model, seq_len)
}

/// Simulates without recording; the search's inner loop. `plan` needs no owners and no hash.
pub(crate) fn step_ns(
    plan: &Plan,
    schedule: &Schedule,
    groups: &[Group],
    shape: &ModelShape,
    costs: &Costs,
    pricing: Pricing,
) -> Result<u64> {
    run(&compile(plan, schedule, groups, shape, costs, pricing)?, None)
}

fn timeline(plan: &Plan, spans: Vec<RankSpans>) -> Timeline {
    let first = spans.iter().flat_map(|s| &s.actions).map(|a| a.start_ns).min().unwrap_or(0);
    let ranks = (0..).map(hgct_core::ids::Rank).zip(spans).zip(&plan.ranks);
    Timeline {
        format: Timeline::FORMAT,
        source: TimelineSource::Predicted,
        first_step: 0,
        ranks: ranks
            .map(|((rank, mut spans), of_plan)| {
                for action in &mut spans.actions {
                    action.start_ns -= first;
                    action.end_ns -= first;
                }
                for transfer in &mut spans.transfers {
                    transfer.start_ns = transfer.start_ns.saturating_sub(first);
                    transfer.end_ns = transfer.end_ns.saturating_sub(first);
                }
                spans.transfers.sort_by_key(|t| (t.start_ns, t.end_ns, t.peer, t.outgoing));
                RankTimeline {
                    rank,
                    device: of_plan.device.clone(),
                    clock_offset_ns: 0,
                    clock_uncertainty_ns: 0,
                    actions: spans.actions,
                    transfers: spans.transfers,
                }
            })
            .collect(),
    }
}

/// Steps that are simulated; the last one is steady.
const NUM_STEPS: usize = 2;

#[derive(Debug, Clone, Default)]
struct RankSpans {
    actions: Vec<ActionSpan>,
    transfers: Vec<TransferSpan>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The rank's run ends, unless its token has changed.
    RunEnds { rank: u32, token: u32 },
    /// The last byte of a message is at its receiver.
    Arrives { message: u32, step: u32 },
    /// The receiver has taken it in.
    Ready { message: u32, step: u32 },
    /// Everybody leaves the barrier.
    Released { step: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Running { end_ns: u64 },
    Waiting { message: u32 },
    AtBarrier,
    Done,
}

struct RankState {
    doing: Doing,
    next: usize,
    step: usize,
    token: u32,
    /// Until when its CPU is taken by sending and receiving.
    taken_until_ns: u64,
    started: Option<(hgct_core::schedule::Action, u64)>,
}

struct Machine<'a> {
    program: &'a Program,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    ranks: Vec<RankState>,
    ready: Vec<bool>,
    /// `[from * ranks + to]`.
    link_free_ns: Vec<u64>,
    at_barrier: [usize; NUM_STEPS],
    finished_ns: [u64; NUM_STEPS],
    spans: Option<&'a mut Vec<RankSpans>>,
}

/// Runs a program's steps; the time of the last.
fn run(program: &Program, spans: Option<&mut Vec<RankSpans>>) -> Result<u64> {
    let num_ranks = program.ranks.len();
    let idle = || RankState {
        doing: Doing::Running { end_ns: 0 },
        next: 0,
        step: 0,
        token: 0,
        taken_until_ns: 0,
        started: None,
    };
    let mut machine = Machine {
        program,
        events: BinaryHeap::new(),
        sequence: 0,
        ranks: (0..num_ranks).map(|_| idle()).collect(),
        ready: vec![false; NUM_STEPS * program.messages.len()],
        link_free_ns: vec![0; num_ranks * num_ranks],
        at_barrier: [0; NUM_STEPS],
        finished_ns: [0; NUM_STEPS],
        spans,
    };
    for rank in 0..num_ranks {
        machine.advance(rank, 0);
    }
    while let Some(Reverse((now, _, event))) = machine.events.pop() {
        machine.handle(now, event);
    }
    if machine.ranks.iter().any(|rank| rank.doing != Doing::Done) {
        return Err(Error::Core(hgct_core::Error::Plan {
            invariant: "schedule",
            found: "a rank waits for ever in the simulation".into(),
        }));
    }
    // What a rank has already received for the step after the last is counted in neither; no steady
    // step is shorter than the busiest rank's work.
    let last_ns = machine.finished_ns[NUM_STEPS - 1] - machine.finished_ns[NUM_STEPS - 2];
    Ok(last_ns.max(program.roofline_ns()))
}

impl Machine<'_> {
    fn at(&mut self, time_ns: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time_ns, self.sequence, event)));
    }

    fn handle(&mut self, now: u64, event: Event) {
        match event {
            Event::RunEnds { rank, token } => {
                if self.ranks[rank as usize].token == token {
                    self.advance(rank as usize, now);
                }
            }
            Event::Arrives { message, step } => self.arrive(now, message, step),
            Event::Ready { message, step } => {
                self.ready[step as usize * self.program.messages.len() + message as usize] = true;
                let rank = self.program.messages[message as usize].to as usize;
                let state = &self.ranks[rank];
                if state.doing == (Doing::Waiting { message }) && state.step == step as usize {
                    self.advance(rank, now);
                }
            }
            Event::Released { step } => {
                for rank in 0..self.ranks.len() {
                    let state = &self.ranks[rank];
                    if state.doing == Doing::AtBarrier && state.step == step as usize {
                        self.advance(rank, now);
                    }
                }
            }
        }
    }

    fn arrive(&mut self, now: u64, message: u32, step: u32) {
        let Message { from, to, bytes, receive_ns, occupied_ns, .. } =
            self.program.messages[message as usize];
        let rank = to as usize;
        let ready_ns = if let Doing::Running { end_ns } = self.ranks[rank].doing {
            let state = &mut self.ranks[rank];
            if receive_ns > 0 {
                let end_ns = end_ns + receive_ns;
                state.doing = Doing::Running { end_ns };
                state.token += 1;
                let token = state.token;
                self.at(end_ns, Event::RunEnds { rank: to, token });
            }
            now + receive_ns
        } else {
            let state = &mut self.ranks[rank];
            state.taken_until_ns = state.taken_until_ns.max(now) + receive_ns;
            state.taken_until_ns
        };
        let span = TransferSpan {
            step: 0,
            peer: hgct_core::ids::Rank(from),
            outgoing: false,
            size_bytes: bytes,
            start_ns: now.saturating_sub(occupied_ns),
            end_ns: ready_ns,
        };
        self.record(rank, step as usize, span);
        self.at(ready_ns, Event::Ready { message, step });
    }

    fn record(&mut self, rank: usize, step: usize, span: TransferSpan) {
        if let Some(spans) = self.spans.as_deref_mut()
            && step == NUM_STEPS - 1
        {
            spans[rank].transfers.push(span);
        }
    }

    /// Executes a rank's instructions until one takes time.
    fn advance(&mut self, rank: usize, now: u64) {
        loop {
            let program = self.program;
            let Some(instruction) = program.ranks[rank].get(self.ranks[rank].next) else {
                let step = self.ranks[rank].step;
                self.finished_ns[step] = self.finished_ns[step].max(now);
                let state = &mut self.ranks[rank];
                if step + 1 == NUM_STEPS || program.ranks[rank].is_empty() {
                    state.doing = Doing::Done;
                    return;
                }
                state.step += 1;
                state.next = 0;
                continue;
            };
            self.ranks[rank].next += 1;
            let state = &mut self.ranks[rank];
            let step = state.step;
            match *instruction {
                Instruction::Begin(action) => state.started = Some((action, now)),
                Instruction::End => self.end_action(rank, now),
                Instruction::Run(0) => {}
                Instruction::Run(ns) => {
                    let end_ns = now.max(state.taken_until_ns) + ns;
                    state.doing = Doing::Running { end_ns };
                    state.token += 1;
                    let token = state.token;
                    self.at(end_ns, Event::RunEnds { rank: rank as u32, token });
                    return;
                }
                Instruction::Send(message) => self.send(rank, now, message, step),
                Instruction::Wait(message) => {
                    if !self.ready[step * program.messages.len() + message as usize] {
                        state.doing = Doing::Waiting { message };
                        return;
                    }
                }
                Instruction::Barrier => {
                    state.doing = Doing::AtBarrier;
                    // What it still has to send goes on beside the barrier.
                    self.at_barrier[step] += 1;
                    if self.at_barrier[step] == self.ranks.len() {
                        self.at(now + program.barrier_ns, Event::Released { step: step as u32 });
                    }
                    return;
                }
            }
        }
    }

    fn end_action(&mut self, rank: usize, now: u64) {
        let state = &mut self.ranks[rank];
        if let (Some((action, start_ns)), Some(spans)) = (state.started.take(), self.spans.as_deref_mut())
            && state.step == NUM_STEPS - 1
        {
            spans[rank].actions.push(ActionSpan { step: 0, action, start_ns, end_ns: now });
        }
    }

    fn send(&mut self, rank: usize, now: u64, message: u32, step: usize) {
        let Message { from, to, bytes, send_ns, occupied_ns, latency_ns, .. } =
            self.program.messages[message as usize];
        let state = &mut self.ranks[rank];
        state.taken_until_ns = state.taken_until_ns.max(now) + send_ns;
        let link = &mut self.link_free_ns[from as usize * self.ranks.len() + to as usize];
        let left_ns = (*link).max(self.ranks[rank].taken_until_ns) + occupied_ns;
        *link = left_ns;
        let span = TransferSpan {
            step: 0,
            peer: hgct_core::ids::Rank(to),
            outgoing: true,
            size_bytes: bytes,
            start_ns: now,
            end_ns: left_ns,
        };
        self.record(rank, step, span);
        self.at(left_ns + latency_ns, Event::Arrives { message, step: step as u32 });
    }
}
