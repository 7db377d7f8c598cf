//! The events of one step, up to the last backward.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::ns;
use super::order::{Op, OpKind, Order};
use super::place::{Places, Unit};
use crate::instance::{Instance, Layout, PricedStage, Schedule, Transfer, price};

/// A computation that took place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Computed {
    pub(super) op: Op,
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
}

/// A transfer that took place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) bytes: u64,
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Computed { unit: usize, op: Op },
    Arrived { unit: usize, op: Op },
}

/// What a unit's work takes.
#[derive(Debug, Clone, Copy)]
struct Work {
    forward_ns: u64,
    backward_ns: u64,
    weight_ns: u64,
}

pub(super) struct Machine<'a> {
    instance: &'a Instance,
    layout: &'a Layout,
    places: &'a Places,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    orders: Vec<Order>,
    work: Vec<Work>,
    /// Until when a unit computes, or hands on in series.
    busy_until_ns: Vec<u64>,
    computing: Vec<bool>,
    /// Per unit: inputs and gradients that are there, and forwards that are done.
    inputs: Vec<std::collections::BTreeSet<(u32, u32)>>,
    gradients: Vec<std::collections::BTreeSet<(u32, u32)>>,
    forwarded: Vec<std::collections::BTreeSet<(u32, u32)>>,
    /// Of each node: when its port has sent and received all so far.
    ports: BTreeMap<(usize, u32, bool), u64>,
    pub(super) priced: Vec<Vec<PricedStage>>,
    pub(super) computed: Vec<Vec<Computed>>,
    pub(super) moved: Vec<Moved>,
    pub(super) contention_ns: u64,
    pub(super) transfer_ns: u64,
}

impl<'a> Machine<'a> {
    pub(super) fn new(instance: &'a Instance, layout: &'a Layout, places: &'a Places) -> Self {
        let priced: Vec<Vec<PricedStage>> =
            price(instance, layout).templates.into_iter().map(|template| template.stages).collect();
        let num = places.units.len();
        let mut machine = Self {
            instance,
            layout,
            places,
            events: BinaryHeap::new(),
            sequence: 0,
            orders: Vec::with_capacity(num),
            work: Vec::with_capacity(num),
            busy_until_ns: vec![0; num],
            computing: vec![false; num],
            inputs: vec![std::collections::BTreeSet::new(); num],
            gradients: vec![std::collections::BTreeSet::new(); num],
            forwarded: vec![std::collections::BTreeSet::new(); num],
            ports: BTreeMap::new(),
            priced,
            computed: vec![Vec::new(); num],
            moved: Vec::new(),
            contention_ns: 0,
            transfer_ns: 0,
        };
        for unit in &places.units {
            let template = &layout.templates[unit.template];
            let depth = template.stages.len() as u32;
            let num_micro_batches = places.pipelines[unit.pipeline].num_micro_batches;
            machine.orders.push(Order::new(template.schedule, depth, unit.stage as u32, num_micro_batches));
            let priced = &machine.priced[unit.template][unit.stage];
            let chunks = f64::from(template.schedule.virtual_stages());
            let whole = crate::instance::Work {
                forward_s: priced.forward_s * unit.factor,
                backward_s: priced.backward_s * unit.factor,
                transfer_s: 0.0,
                recompute: template.stages[unit.stage].recompute,
            };
            let weight = if template.schedule == Schedule::ZeroBubble { whole.weights_s() } else { 0.0 };
            machine.work.push(Work {
                forward_ns: ns(whole.forward_s / chunks),
                backward_ns: ns((whole.backward_s - weight) / chunks),
                weight_ns: ns(weight),
            });
        }
        machine
    }

    pub(super) fn run(&mut self) {
        for unit in 0..self.places.units.len() {
            self.start(unit, 0);
        }
        let mut now = 0;
        loop {
            while let Some(Reverse((at, _, event))) = self.events.pop() {
                now = at;
                match event {
                    Event::Computed { unit, op } => self.finish(unit, op, now),
                    Event::Arrived { unit, op } => self.arrive(unit, op, now),
                }
            }
            if self.orders.iter().all(Order::is_done) {
                return;
            }
            // Everybody waits: an interleaved order that its micro-batches do not fill.
            for unit in 0..self.orders.len() {
                self.orders[unit].relax();
                self.start(unit, now);
            }
        }
    }

    fn at(&mut self, time_ns: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time_ns, self.sequence, event)));
    }

    fn unit(&self, unit: usize) -> &'a Unit {
        &self.places.units[unit]
    }

    /// Units of the same pipeline, of that many stages and virtual stages.
    fn shape(&self, unit: usize) -> (usize, u32, u32) {
        let of = self.unit(unit);
        let template = &self.layout.templates[of.template];
        (
            self.places.pipelines[of.pipeline].first_unit,
            template.stages.len() as u32,
            template.schedule.virtual_stages(),
        )
    }

    fn start(&mut self, unit: usize, now: u64) {
        if self.computing[unit] {
            return;
        }
        let (first, depth, chunks) = self.shape(unit);
        let stage = (unit - first) as u32;
        let (inputs, gradients, forwarded) =
            (&self.inputs[unit], &self.gradients[unit], &self.forwarded[unit]);
        let ready = |op: Op| {
            let key = (op.chunk, op.micro_batch);
            match op.kind {
                OpKind::Forward => (op.chunk == 0 && stage == 0) || inputs.contains(&key),
                OpKind::Backward => {
                    forwarded.contains(&key)
                        && ((op.chunk + 1 == chunks && stage + 1 == depth) || gradients.contains(&key))
                }
                OpKind::Weight => true,
            }
        };
        let Some(op) = self.orders[unit].take(ready) else { return };
        let work = self.work[unit];
        let length = match op.kind {
            OpKind::Forward => work.forward_ns,
            OpKind::Backward => work.backward_ns,
            OpKind::Weight => work.weight_ns,
        };
        let start_ns = now.max(self.busy_until_ns[unit]);
        self.computing[unit] = true;
        self.computed[unit].push(Computed { op, start_ns, end_ns: start_ns + length });
        self.at(start_ns + length, Event::Computed { unit, op });
    }

    fn finish(&mut self, unit: usize, op: Op, now: u64) {
        let (first, depth, chunks) = self.shape(unit);
        let stage = (unit - first) as u32;
        self.computing[unit] = false;
        let mut free = now;
        match op.kind {
            OpKind::Forward => {
                self.forwarded[unit].insert((op.chunk, op.micro_batch));
                // To the next stage, from the last one to the first of the next virtual stage.
                let (next, chunk) = if stage + 1 < depth { (stage + 1, op.chunk) } else { (0, op.chunk + 1) };
                if chunk < chunks {
                    free = self.hand_on(unit, first + next as usize, Op { chunk, ..op }, now);
                } else {
                    self.orders[unit].offer_backward(op.chunk, op.micro_batch);
                }
            }
            OpKind::Backward => {
                let before = if stage > 0 {
                    Some((stage - 1, op.chunk))
                } else {
                    op.chunk.checked_sub(1).map(|chunk| (depth - 1, chunk))
                };
                if let Some((previous, chunk)) = before {
                    free = self.hand_on(unit, first + previous as usize, Op { chunk, ..op }, now);
                }
            }
            OpKind::Weight => {}
        }
        self.busy_until_ns[unit] = free;
        self.start(unit, now);
    }

    fn arrive(&mut self, unit: usize, op: Op, now: u64) {
        let key = (op.chunk, op.micro_batch);
        if op.kind == OpKind::Forward {
            self.inputs[unit].insert(key);
        } else {
            self.gradients[unit].insert(key);
            self.orders[unit].offer_backward(op.chunk, op.micro_batch);
        }
        self.start(unit, now);
    }

    /// Sends what `op` has made; returns when the sender may go on.
    fn hand_on(&mut self, from: usize, to: usize, op: Op, now: u64) -> u64 {
        if from == to {
            self.at(now, Event::Arrived { unit: to, op });
            return now;
        }
        let (sender, receiver) = (self.unit(from), self.unit(to));
        let template = &self.layout.templates[sender.template];
        // A gradient has the size of the activation that it answers.
        let giver = if op.kind == OpKind::Forward { sender } else { receiver };
        let layer = template.stages[giver.stage].end_layer - 1;
        let bytes = self.output_bytes(layer) * f64::from(template.micro_batch);
        let (a, b) = (sender.groups[0], receiver.groups[0]);
        let devices = |unit: &Unit| {
            let group = unit.groups[0];
            let all = group.devices * unit.groups.len() as u32;
            all.min(self.instance.pools[group.pool].devices_per_node)
        };
        let (count_a, count_b) = (devices(sender), devices(receiver));
        let inside =
            (a.pool, a.node) == (b.pool, b.node) && self.instance.rules.transfer != Transfer::Published;
        let (length, occupied) = if inside {
            let seconds = self.instance.pools[a.pool].intra.seconds(count_a, count_b, bytes);
            (ns(seconds), 0)
        } else {
            let link = &self.instance.inter[a.pool][b.pool];
            let seconds = link.seconds(count_a, count_b, bytes);
            let node = |pool: usize| self.instance.pools[pool].devices_per_node;
            let alone = link.seconds(node(a.pool), node(b.pool), bytes);
            (ns(seconds), ns(alone.min(seconds)))
        };
        let mut end = now + length;
        if occupied > 0 {
            for port in [(a.pool, a.node, true), (b.pool, b.node, false)] {
                let free = self.ports.entry(port).or_default();
                *free = (*free).max(now) + occupied;
                end = end.max(*free);
            }
        }
        self.contention_ns += end - now - length;
        self.transfer_ns += length;
        self.moved.push(Moved { from, to, bytes: bytes.round() as u64, start_ns: now, end_ns: end });
        self.at(end, Event::Arrived { unit: to, op });
        if self.instance.rules.transfer == Transfer::Overlapped { now } else { end }
    }

    fn output_bytes(&self, layer: u32) -> f64 {
        let mut left = layer;
        for run in &self.instance.runs {
            if left < run.count {
                return self.instance.classes[run.class].output_bytes;
            }
            left -= run.count;
        }
        0.0
    }
}
