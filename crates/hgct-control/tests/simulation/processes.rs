//! What the world's worker processes do.

use hgct_control::agent;
use hgct_control::message::{Envelope, Exit, FromWorker, ToWorker};
use hgct_core::canonical::Hash;
use hgct_core::ids::{DeviceId, Generation, Rank};
use hgct_core::manifest::ShardEnd;
use hgct_core::schedule::Operation;

use crate::worker::{self, Process};
use crate::world::{Do, Happening, MS, World};

impl World {
    pub(crate) fn processes_where(&self, is_chosen: impl Fn(&Process) -> bool) -> Vec<DeviceId> {
        self.processes.iter().filter(|(_, process)| is_chosen(process)).map(|(d, _)| d.clone()).collect()
    }

    /// An event of a worker's for its agent, in order.
    pub(crate) fn pipe(&mut self, device: &DeviceId, event: agent::Event) {
        let Some(name) = self.processes.get(device).map(|process| process.node.clone()) else { return };
        let delay = self.random.range(MS / 10, 2 * MS);
        let last = self.pipes.entry(device.clone()).or_default();
        let at = (self.now + delay).max(*last);
        *last = at;
        self.at(at, Happening::Agent(name, event));
    }

    pub(crate) fn say(
        &mut self,
        device: &DeviceId,
        generation: Generation,
        message: FromWorker,
        payload: Vec<u8>,
    ) {
        let Some(process) = self.processes.get_mut(device) else { return };
        let envelope = Box::new(process.seal(generation, message));
        self.pipe(device, agent::Event::WorkerMessage { worker: device.clone(), envelope, payload });
    }

    pub(crate) fn later(&mut self, device: &DeviceId, low: u64, high: u64, message: FromWorker) {
        let Some(process) = self.processes.get(device) else { return };
        let say = Do::Say(process.generation, Box::new(message));
        self.after(low, high, Happening::Worker(device.clone(), say));
    }

    pub(crate) fn order(&mut self, device: &DeviceId, envelope: Envelope<ToWorker>) {
        let Some(process) = self.processes.get_mut(device).filter(|process| process.alive) else { return };
        if process.hung {
            return;
        }
        process.inbox.admit(&envelope).unwrap();
        match envelope.message {
            ToWorker::Attach { .. } => {
                self.after(0, MS, Happening::Worker(device.clone(), Do::Beat));
                let hello = FromWorker::Hello { description: worker::description(), endpoints: Vec::new() };
                self.later(device, 50 * MS, 500 * MS, hello);
            }
            ToWorker::Check { kind, .. } => {
                let report = crate::driver::check_report(device, kind);
                self.later(device, 20 * MS, 300 * MS, FromWorker::Checked { report });
            }
            ToWorker::Load { generation, rank, .. } => {
                process.generation = generation;
                process.rank = Some(rank);
                process.enter(self.now, None);
                self.later(device, 10 * MS, 200 * MS, FromWorker::Loaded);
            }
            ToWorker::Connect { peers, .. } => {
                process.generation = envelope.generation;
                let group = self.groups.entry(envelope.generation).or_default();
                group.devices = peers.into_iter().map(|peer| peer.device).collect();
                group.connected += 1;
                if group.connected as usize == group.devices.len() {
                    for device in group.devices.clone() {
                        self.after(MS, 30 * MS, Happening::Worker(device, Do::Connected));
                    }
                }
            }
            ToWorker::MeasureLinks => {
                self.later(device, MS, 50 * MS, FromWorker::LinksMeasured { links: Vec::new() });
            }
            ToWorker::Start { step, end_step, .. } => {
                let generation = process.generation;
                (process.step, process.end_step, process.training) = (step, end_step, true);
                self.say(device, generation, FromWorker::Ready, Vec::new());
                if step == end_step {
                    let finished = FromWorker::Finished { step, stopped: false };
                    self.say(device, generation, finished, Vec::new());
                } else {
                    self.arrive(device);
                }
            }
            ToWorker::Stop => process.stop = true,
            ToWorker::Exit => {
                // Now and then an exit is too slow for the grace.
                let high = if self.random.chance(10) { 3000 * MS } else { 300 * MS };
                self.after(MS, high, Happening::Worker(device.clone(), Do::Exit(Exit::Code { code: 0 })));
            }
            ToWorker::State { .. }
            | ToWorker::Profile { .. }
            | ToWorker::Generate { .. }
            | ToWorker::TrainAlone { .. } => {}
        }
    }

    pub(crate) fn work(&mut self, device: &DeviceId, what: Do) {
        let Some(process) = self.processes.get_mut(device).filter(|process| process.alive) else { return };
        let acts = process.acts();
        let generation = process.generation;
        match what {
            Do::Exit(exit) if !process.hung || matches!(exit, Exit::Signal { .. }) => self.died(device, exit),
            // Else a stopped process does not see that its pipe closed; its death signal ends it.
            Do::Exit(_) if self.nodes.get(&process.node).is_none_or(|node| node.agent.is_none()) => {
                self.died(device, Exit::Signal { signal: 9 });
            }
            Do::Beat if acts => {
                let beat = process.beat(self.now);
                self.say(device, generation, FromWorker::Beat(beat), Vec::new());
                self.after(500 * MS, 501 * MS, Happening::Worker(device.clone(), Do::Beat));
            }
            Do::Say(generation, message) if acts && !process.stalled => {
                self.say(device, generation, *message, Vec::new());
            }
            Do::Connected if acts && !process.stalled => {
                self.say(device, generation, FromWorker::Connected, Vec::new());
            }
            Do::StepDone(step) if acts && !process.stalled => self.step_done(device, generation, step),
            Do::Evaluated if acts && !process.stalled => {
                if process.rank == Some(Rank(0)) {
                    let (step, loss_sum) = (process.step, 1.0);
                    let evaluated = FromWorker::Evaluated { step, loss_sum, num_tokens: 64 };
                    self.say(device, generation, evaluated, Vec::new());
                }
                self.arrive(device);
            }
            Do::Blame if acts && !process.stalled => {
                let group =
                    self.groups.get(&generation).map(|group| group.devices.clone()).unwrap_or_default();
                let is_down =
                    |device: &DeviceId| self.processes.get(device).is_some_and(|p| !p.alive || p.failed);
                let down: Vec<Rank> =
                    (0..).map(Rank).zip(&group).filter(|(_, d)| is_down(d)).map(|(rank, _)| rank).collect();
                if !down.is_empty() {
                    let peer = *self.random.pick(&down);
                    self.give_up(device, format!("connection to {peer} was reset"), Some(peer));
                }
            }
            Do::BlameHung(peer) if acts && !process.stalled && process.training => {
                self.give_up(device, format!("{peer} did not answer within 10 s"), Some(peer));
            }
            _ => {}
        }
    }

    /// The worker says that it cannot go on, and exits.
    pub(crate) fn give_up(&mut self, device: &DeviceId, error: String, peer: Option<Rank>) {
        let Some(process) = self.processes.get_mut(device) else { return };
        process.failed = true;
        let generation = process.generation;
        self.say(device, generation, FromWorker::Failed { error, peer }, Vec::new());
        self.after(MS, 50 * MS, Happening::Worker(device.clone(), Do::Exit(Exit::Code { code: 1 })));
    }

    pub(crate) fn died(&mut self, device: &DeviceId, exit: Exit) {
        let Some(process) = self.processes.get_mut(device) else { return };
        process.alive = false;
        let (generation, was_training) = (process.generation, process.rank.is_some());
        self.last_alive_ns = self.last_alive_ns.max(self.now);
        let log_tail = "the end".into();
        self.pipe(device, agent::Event::WorkerExited { worker: device.clone(), exit, log_tail });
        if was_training {
            let peers = self.groups.get(&generation).map(|group| group.devices.clone()).unwrap_or_default();
            for peer in peers {
                if self.processes.get(&peer).is_some_and(|p| p.training && p.generation == generation) {
                    self.after(MS, 150 * MS, Happening::Worker(peer, Do::Blame));
                }
            }
        }
    }

    /// The worker has come to its next step and waits for the others.
    pub(crate) fn arrive(&mut self, device: &DeviceId) {
        let Some(process) = self.processes.get_mut(device) else { return };
        let (generation, step) = (process.generation, process.step);
        let Some(rank) = process.rank else { return };
        process.enter(self.now, Some(Operation::RecvActivation));
        self.groups.entry(generation).or_default().arrived.insert(rank, step);
        self.try_step(generation);
    }

    /// Starts the step that all ranks have come to.
    pub(crate) fn try_step(&mut self, generation: Generation) {
        let Some(group) = self.groups.get(&generation) else { return };
        let devices = group.devices.clone();
        let steps: Vec<u64> = group.arrived.values().copied().collect();
        let Some(step) = steps.iter().min().copied() else { return };
        let together = steps.len() == devices.len() && steps.iter().all(|s| *s == step);
        let ready = devices.iter().all(|device| {
            let process = self.processes.get(device);
            process.is_some_and(|p| {
                let held = self.nodes.get(&p.node).is_some_and(|node| node.held_until > self.now);
                p.acts() && !p.stalled && !held
            })
        });
        if !together || !ready || self.running.get(&generation).is_some_and(|running| *running >= step) {
            return;
        }
        self.running.insert(generation, step);
        if devices.iter().any(|device| self.processes.get(device).is_some_and(|p| p.stop)) {
            self.stop_after.entry(generation).or_insert(step);
        }
        let duration = self.random.range(50 * MS, 400 * MS);
        for device in devices {
            if let Some(process) = self.processes.get_mut(&device) {
                process.enter(self.now, Some(Operation::Forward));
            }
            self.after(duration, duration + 20 * MS, Happening::Worker(device, Do::StepDone(step)));
        }
    }

    pub(crate) fn step_done(&mut self, device: &DeviceId, generation: Generation, step: u64) {
        let broken = self.groups.get(&generation).is_some_and(|group| {
            group
                .devices
                .iter()
                .any(|d| self.processes.get(d).is_some_and(|p| !p.alive || p.hung || p.stalled))
        });
        let Some(process) = self.processes.get_mut(device) else { return };
        if process.step != step {
            return;
        }
        if broken {
            // Its own part is done; it waits for the others'.
            process.enter(self.now, Some(Operation::RecvActivation));
            return;
        }
        process.step += 1;
        let rank = process.rank.unwrap_or(Rank(0));
        let stopped = self.stop_after.get(&generation) == Some(&step);
        let last = process.step == process.end_step || stopped;
        let is_second = step == 1 || step == crate::driver::STEPS[0] + 1;
        process.enter(self.now, None);
        let mut loss = worker::loss(generation, step);
        if self.scenario.nan_from.is_some_and(|from| step >= from) {
            loss = f64::NAN;
        }
        if self.scenario.wrong_at == Some(step) && rank == Rank(0) {
            loss += 1.0;
        }
        let report = worker::report(generation, step, loss);
        self.say(device, generation, FromWorker::StepDone(report), Vec::new());
        if last || step % 3 == 2 {
            let chunk = FromWorker::ShardChunk {
                step: step + 1,
                num_updates: step + 1,
                offset: 0,
                end: Some(ShardEnd { entries: Vec::new(), sha256: Hash::of_bytes(b"") }),
            };
            self.say(device, generation, chunk, vec![rank.0 as u8; 5]);
        }
        if last {
            let finished = FromWorker::Finished { step: step + 1, stopped };
            self.say(device, generation, finished, Vec::new());
            if let Some(process) = self.processes.get_mut(device) {
                process.training = false;
            }
        } else if let Some(compile_ns) = self.scenario.compile_ns.filter(|_| is_second) {
            if let Some(process) = self.processes.get_mut(device) {
                process.waits = rank != Rank(0);
            }
            self.after(compile_ns, compile_ns + MS, Happening::Worker(device.clone(), Do::Evaluated));
        } else {
            self.arrive(device);
        }
    }
}
