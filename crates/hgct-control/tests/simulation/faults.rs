//! Faults, as they hit the world.

use hgct_control::agent;
use hgct_control::coordinator::{Command, Event, LostCause, Phase};
use hgct_control::message::{Exit, FromWorker};
use hgct_core::ids::{DeviceId, Generation, NodeId, Rank};
use hgct_core::schedule::Operation;

use crate::scenario::FaultKind;
use crate::worker;
use crate::world::{Do, FOR_EVER, Happening, MS, STEP_DEADLINE, World};

impl World {
    pub(crate) fn fault(&mut self, index: usize) {
        let Some(fault) = self.scenario.faults.get(index).cloned() else { return };
        if self.apply(&fault.kind) {
            self.hits.push((self.now, fault));
        }
    }

    /// Whether it hit something.
    pub(crate) fn apply(&mut self, kind: &FaultKind) -> bool {
        let over = self.ending_ns.is_some();
        match kind {
            FaultKind::KillWorker(device) => {
                let alive = self.processes.get(device).is_some_and(|process| process.alive);
                if alive {
                    self.died(device, Exit::Signal { signal: 9 });
                }
                alive && !over
            }
            FaultKind::FailWorker(device) => {
                let acts = self.processes.get(device).is_some_and(|p| p.acts() && p.rank.is_some());
                if acts {
                    self.give_up(device, "the engine is out of memory".into(), None);
                }
                acts && !over
            }
            FaultKind::HangWorker(device) | FaultKind::StallWorker(device) => {
                let hang = matches!(kind, FaultKind::HangWorker(_));
                let now = self.now;
                let Some(process) = self.processes.get_mut(device) else { return false };
                // A stall is about an action: outside of training it would be a deadline's matter.
                if !process.acts() || process.stalled || (!hang && !process.training) {
                    return false;
                }
                process.hung |= hang;
                process.stalled |= !hang;
                if !hang {
                    process.enter(now, Some(Operation::Forward));
                }
                let (generation, rank) = (process.generation, process.rank);
                let group =
                    self.groups.get(&generation).map(|group| group.devices.clone()).unwrap_or_default();
                if let Some(rank) = rank {
                    for peer in group.into_iter().filter(|peer| peer != device) {
                        let at = self.now + STEP_DEADLINE;
                        self.at(at, Happening::Worker(peer, Do::BlameHung(rank)));
                    }
                }
                !over
            }
            FaultKind::KillAgent(name) => {
                let there = self.nodes.get(name).is_some_and(|node| node.agent.is_some());
                if there {
                    self.agent_gone(name, LostCause::Closed);
                }
                there && !over
            }
            FaultKind::HangAgent(name, for_ns) => {
                let Some(node) = self.nodes.get_mut(name).filter(|node| node.agent.is_some()) else {
                    return false;
                };
                node.hung = true;
                self.at(self.now + for_ns, Happening::ResumeAgent(name.clone()));
                true
            }
            FaultKind::Hold(name, for_ns) => {
                let until = self.now.saturating_add(*for_ns).min(FOR_EVER);
                let Some(node) = self.nodes.get_mut(name) else { return false };
                node.held_until = node.held_until.max(until);
                if until < FOR_EVER {
                    self.at(until, Happening::Regroup);
                }
                !over
            }
            FaultKind::Reset(name) => {
                let Some(node) = self.nodes.get_mut(name).filter(|node| node.connected) else { return false };
                let connection = node.connection;
                let message: String = "connection reset by peer".into();
                let cause = LostCause::Connection { message: message.clone() };
                self.up(name, Event::AgentLost { connection, cause });
                self.down(name, agent::Event::Disconnected { reason: message });
                !over
            }
            FaultKind::CrashCoordinator => {
                let names: Vec<NodeId> = self.nodes.keys().cloned().collect();
                for name in names {
                    self.down(&name, agent::Event::Disconnected { reason: "end of file".into() });
                    if let Some(node) = self.nodes.get_mut(&name) {
                        node.connected = false;
                    }
                }
                self.coordinator.take().is_some_and(|machine| machine.phase() != Phase::Ended)
            }
            FaultKind::PauseCoordinator(for_ns) | FaultKind::SlowDriver(for_ns) => {
                // A stopped process is not made to run by a slow driver, nor the other way round.
                // Before anything is said to the agents, nobody is behind.
                let joins =
                    self.coordinator.as_ref().is_none_or(|machine| machine.phase() == Phase::Gathering);
                let slow = matches!(kind, FaultKind::SlowDriver(_));
                if self.coordinator_paused || (slow && joins) {
                    return false;
                }
                self.coordinator_paused = true;
                self.coordinator_behind = slow;
                self.at(self.now + for_ns, Happening::ResumeCoordinator);
                true
            }
            FaultKind::Stop { twice } => {
                for at in [0, 50 * MS].into_iter().take(1 + usize::from(*twice)) {
                    let command = Box::new(Command::Stop);
                    self.at(self.now + at, Happening::Coordinator(Event::Command { command }));
                }
                !over
            }
            FaultKind::Ghost(device) => self.ghost(device),
        }
    }

    /// Words of an older generation that come late.
    pub(crate) fn ghost(&mut self, device: &DeviceId) -> bool {
        let Some(process) = self.processes.get(device).filter(|process| process.acts()) else { return false };
        let (generation, step) = (process.generation, process.step);
        if generation.sequence < 2 {
            return false;
        }
        let old = Generation { sequence: generation.sequence - 1, ..generation };
        let words = [
            FromWorker::StepDone(worker::report(old, step, 1.0)),
            FromWorker::Finished { step, stopped: false },
            FromWorker::Failed { error: "a ghost".into(), peer: Some(Rank(0)) },
            FromWorker::Loaded,
            FromWorker::Ready,
            FromWorker::Connected,
        ];
        for word in words {
            self.say(device, old, word, Vec::new());
        }
        true
    }
}
