//! What goes wrong in a run, by seed.

use hgct_core::ids::{DeviceId, NodeId};

use crate::random::Random;
use crate::world::{MS, SECOND};

#[derive(Debug, Clone)]
pub(crate) enum FaultKind {
    /// SIGKILL.
    KillWorker(DeviceId),
    /// It says that it failed, and exits.
    FailWorker(DeviceId),
    /// SIGSTOP.
    HangWorker(DeviceId),
    /// It beats, but computes for ever.
    StallWorker(DeviceId),
    KillAgent(NodeId),
    /// SIGSTOP, and SIGCONT after that time.
    HangAgent(NodeId, u64),
    /// The network holds all of a node's packets for that time.
    Hold(NodeId, u64),
    /// The network breaks a node's control connection.
    Reset(NodeId),
    CrashCoordinator,
    /// SIGSTOP and SIGCONT.
    PauseCoordinator(u64),
    /// The driver takes no updates for that time, so the shell takes no frames.
    SlowDriver(u64),
    /// The user stops.
    Stop {
        twice: bool,
    },
    /// Words of an older generation.
    Ghost(DeviceId),
}

#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) at_ns: u64,
    pub(crate) kind: FaultKind,
}

/// One run.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) nodes: Vec<NodeId>,
    pub(crate) workers: Vec<(NodeId, DeviceId)>,
    /// Most delay of the control network.
    pub(crate) delay_ns: u64,
    pub(crate) faults: Vec<Fault>,
    /// Losses are not finite from this step on.
    pub(crate) nan_from: Option<u64>,
    /// Rank 0 reports another loss at this step.
    pub(crate) wrong_at: Option<u64>,
    /// After the second step of a load there is an evaluation, and rank 0 compiles for so long.
    pub(crate) compile_ns: Option<u64>,
}

/// Holds and pauses up to here hurt nobody.
pub(crate) const HARMLESS: u64 = 1800 * MS;

impl Scenario {
    pub(crate) fn quiet(seed: u64) -> Self {
        let mut random = Random(seed);
        let nodes: Vec<NodeId> =
            (0..random.range(1, 4)).map(|n| NodeId::new(format!("n{n}")).unwrap()).collect();
        let mut workers = Vec::new();
        for node in &nodes {
            let count = if nodes.len() == 1 { random.range(2, 5) } else { random.range(1, 3) };
            for index in 0..count {
                workers.push((node.clone(), DeviceId::new(format!("{node}/torch:{index}")).unwrap()));
            }
        }
        let delay_ns = *random.pick(&[MS, 20 * MS, 150 * MS]);
        let (faults, nan_from, wrong_at, compile_ns) = (Vec::new(), None, None, None);
        Self { seed, nodes, workers, delay_ns, faults, nan_from, wrong_at, compile_ns }
    }

    pub(crate) fn random(seed: u64) -> Self {
        let mut scenario = Self::quiet(seed);
        let mut random = Random(seed ^ 0x5eed);
        let count = *random.pick(&[1, 1, 1, 2, 2, 3]);
        for _ in 0..count {
            let at_ns = random.range(0, 9 * SECOND);
            let kind = scenario.kind(&mut random);
            // Two short silences add up to a long one.
            let silences = |kind: &FaultKind| {
                let pauses = matches!(kind, FaultKind::PauseCoordinator(_) | FaultKind::SlowDriver(_));
                pauses || matches!(kind, FaultKind::HangAgent(..) | FaultKind::Hold(..))
            };
            if silences(&kind) && scenario.faults.iter().any(|fault| silences(&fault.kind)) {
                continue;
            }
            scenario.faults.push(Fault { at_ns, kind });
        }
        match random.range(0, 20) {
            0 => scenario.nan_from = Some(random.range(0, 8)),
            1 => scenario.wrong_at = Some(random.range(0, 10)),
            _ => {}
        }
        if random.chance(20) {
            scenario.compile_ns = Some(random.range(6 * SECOND, 9 * SECOND));
        }
        scenario
    }

    fn kind(&self, random: &mut Random) -> FaultKind {
        let worker = random.pick(&self.workers).1.clone();
        let node = random.pick(&self.nodes).clone();
        match random.range(0, 17) {
            0..=2 => FaultKind::KillWorker(worker),
            3 => FaultKind::FailWorker(worker),
            4 => FaultKind::HangWorker(worker),
            5 => FaultKind::StallWorker(worker),
            6 => FaultKind::KillAgent(node),
            7 => FaultKind::HangAgent(node, *random.pick(&[HARMLESS, 7 * SECOND])),
            8 => FaultKind::Hold(node, *random.pick(&[HARMLESS, 6 * SECOND, u64::MAX])),
            9 => FaultKind::Reset(node),
            10 => FaultKind::CrashCoordinator,
            11 => FaultKind::PauseCoordinator(random.range(0, HARMLESS)),
            12 => FaultKind::Stop { twice: false },
            13 => FaultKind::Stop { twice: true },
            14 => FaultKind::SlowDriver(random.range(0, 8 * SECOND)),
            _ => FaultKind::Ghost(worker),
        }
    }
}

impl Fault {
    /// Whether a run with this fault alone must complete.
    pub(crate) fn is_harmless(&self) -> bool {
        match &self.kind {
            FaultKind::HangAgent(_, for_ns) | FaultKind::Hold(_, for_ns) => *for_ns <= HARMLESS,
            FaultKind::PauseCoordinator(_) | FaultKind::SlowDriver(_) | FaultKind::Ghost(_) => true,
            _ => false,
        }
    }

    pub(crate) fn is_stop(&self) -> bool {
        matches!(self.kind, FaultKind::Stop { .. })
    }

    /// Whether an error that names this worker and node names what the fault hit.
    pub(crate) fn hits(&self, worker: Option<&DeviceId>, node: Option<&NodeId>) -> bool {
        match &self.kind {
            FaultKind::KillWorker(hit)
            | FaultKind::FailWorker(hit)
            | FaultKind::HangWorker(hit)
            | FaultKind::StallWorker(hit) => worker == Some(hit),
            FaultKind::KillAgent(hit)
            | FaultKind::Reset(hit)
            | FaultKind::HangAgent(hit, _)
            | FaultKind::Hold(hit, _) => node == Some(hit),
            _ => false,
        }
    }

    /// From the fault to the verdict, at most.
    pub(crate) fn verdict_ns(&self) -> u64 {
        match &self.kind {
            FaultKind::StallWorker(_) => 14 * SECOND,
            FaultKind::HangWorker(_) | FaultKind::HangAgent(..) | FaultKind::Hold(..) => 4500 * MS,
            _ => 1500 * MS,
        }
    }
}
