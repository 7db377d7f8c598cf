use hgct_core::cluster::Grant;
use hgct_core::ids::EnvironmentId;

use super::*;
use crate::auth::Token;

const MS: u64 = 1_000_000;

struct Rig {
    agent: Agent,
    coordinator: Outbox,
    worker: Outbox,
}

fn run() -> RunId {
    RunId::new("run-1").unwrap()
}

fn device() -> DeviceId {
    DeviceId::new("n/torch:0").unwrap()
}

impl Rig {
    fn new() -> Self {
        let config = Config {
            run: run(),
            node: NodeId::new("n").unwrap(),
            pid: 1,
            memory_bytes: 1,
            data_key: Key::data(&Token::from_random(&[1; 32]), &run()),
            blobs: "blobs".into(),
            listen: Vec::new(),
            advertise: Vec::new(),
        };
        let (coordinator, worker) = (Outbox::new(run()), Outbox::new(run()));
        Self { agent: Agent::new(config, 0), coordinator, worker }
    }

    fn effects(&mut self) -> Vec<Effect> {
        std::iter::from_fn(|| self.agent.poll_effect()).collect()
    }

    fn hear(&mut self, now_ns: u64, generation: u64, message: ToAgent) -> Vec<Effect> {
        let generation = Generation { epoch: 0, sequence: generation };
        let envelope = Box::new(self.coordinator.seal(generation, message));
        self.agent.handle(now_ns, Event::Message { envelope, payload: Vec::new() });
        self.effects()
    }

    fn handle(&mut self, now_ns: u64, event: Event) -> Vec<Effect> {
        self.agent.handle(now_ns, event);
        self.effects()
    }

    /// A rig with one worker that runs.
    fn with_worker() -> Self {
        let mut rig = Self::new();
        rig.effects();
        let effects = rig.hear(0, 0, ToAgent::StartWorkers { workers: vec![start()] });
        assert!(matches!(&effects[..], [Effect::Spawn { start }] if start.device == device()));
        let (engine, modules) = ("torch".into(), Vec::new());
        rig.handle(0, Event::WorkerStarted { worker: device(), pid: 9, engine, modules });
        rig
    }

    fn exited(&mut self, now_ns: u64) -> Vec<Effect> {
        let exit = Exit::Code { code: 0 };
        self.handle(now_ns, Event::WorkerExited { worker: device(), exit, log_tail: String::new() })
    }
}

fn start() -> WorkerStart {
    WorkerStart {
        device: device(),
        environment: EnvironmentId::new("torch").unwrap(),
        device_string: "cpu".into(),
        grant: Grant { cpu_millicores: 1, cores: Vec::new(), threads: 1, memory_bytes: 1 },
    }
}

fn is_kill(effect: &Effect) -> bool {
    matches!(effect, Effect::Kill { signal: 9, .. })
}

fn is_exit(effect: &Effect) -> bool {
    matches!(effect, Effect::Exit { .. })
}

fn says<'a>(effects: &'a [Effect], is_it: impl Fn(&FromAgent) -> bool + 'a) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Send { envelope, .. } if is_it(&envelope.message)))
}

#[test]
fn the_first_word_is_join_and_the_worker_is_attached_first() {
    let mut rig = Rig::new();
    assert!(says(&rig.effects(), |message| matches!(message, FromAgent::Join { pid: 1, .. })));
    rig.hear(0, 0, ToAgent::StartWorkers { workers: vec![start()] });
    let (engine, modules) = ("torch".into(), vec!["plugin".into()]);
    let effects = rig.handle(0, Event::WorkerStarted { worker: device(), pid: 9, engine, modules });
    let Effect::WriteWorker { envelope, .. } = &effects[0] else { panic!("{effects:?}") };
    let ToWorker::Attach { run_key, modules, .. } = &envelope.message else { panic!("{envelope:?}") };
    assert_eq!((run_key.len(), modules.len(), envelope.sequence), (64, 1, 0));
    assert!(says(&effects, |message| matches!(message, FromAgent::WorkerStarted { pid: 9, .. })));
}

#[test]
fn nothing_of_an_older_generation_reaches_a_worker() {
    let mut rig = Rig::with_worker();
    let stop = || ToAgent::Forward { worker: device(), message: ToWorker::Stop };
    assert!(matches!(&rig.hear(1, 2, stop())[..], [Effect::WriteWorker { .. }]));
    assert!(rig.hear(2, 1, stop()).is_empty());
    assert!(matches!(&rig.hear(3, 2, stop())[..], [Effect::WriteWorker { .. }]));
}

#[test]
fn only_the_agent_attaches() {
    let mut rig = Rig::with_worker();
    let message = ToWorker::Attach {
        device: device(),
        engine: "x".into(),
        device_string: "x".into(),
        modules: Vec::new(),
        node: NodeId::new("n").unwrap(),
        run_key: String::new(),
        blobs: "/".into(),
        listen: Vec::new(),
        advertise: Vec::new(),
        heartbeat_ns: 1,
    };
    assert!(rig.hear(1, 0, ToAgent::Forward { worker: device(), message }).is_empty());
}

#[test]
fn a_silent_coordinator_ends_everything() {
    let mut rig = Rig::with_worker();
    for at in (500..3000).step_by(500) {
        assert!(!rig.handle(at * MS, Event::Tick { memory_bytes: 1 }).iter().any(is_kill), "{at}");
    }
    let effects = rig.handle(3000 * MS, Event::Tick { memory_bytes: 1 });
    assert!(effects.iter().any(is_kill));
    assert!(says(&effects, |message| matches!(message, FromAgent::Leaving { .. })));
    let effects = rig.exited(3010 * MS);
    assert!(matches!(effects.last(), Some(Effect::Exit { orderly: false, .. })), "{effects:?}");
    assert_eq!(rig.agent.poll_timeout(), None);
}

#[test]
fn a_closed_connection_kills_at_once_and_does_not_wait_for_ever() {
    let mut rig = Rig::with_worker();
    let effects = rig.handle(MS, Event::Disconnected { reason: "end of file".into() });
    assert!(effects.iter().any(is_kill) && !effects.iter().any(is_exit));
    // The process hangs in the kernel: nobody can wait for it.
    let until = rig.agent.poll_timeout().unwrap();
    assert!(until <= 1001 * MS);
    let mut at = until;
    while !rig.handle(at, Event::Tick { memory_bytes: 1 }).iter().any(is_exit) {
        at = rig.agent.poll_timeout().unwrap();
        assert!(at <= 1001 * MS);
    }
}

#[test]
fn a_worker_is_asked_before_it_is_killed() {
    let mut rig = Rig::with_worker();
    let effects = rig.hear(MS, 0, ToAgent::StopWorkers { workers: Vec::new(), grace_ns: 700 * MS });
    let [Effect::WriteWorker { envelope, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(envelope.message, ToWorker::Exit);
    assert!(!rig.handle(700 * MS, Event::Tick { memory_bytes: 1 }).iter().any(is_kill));
    assert!(rig.handle(701 * MS, Event::Tick { memory_bytes: 1 }).iter().any(is_kill));
}

#[test]
fn shutdown_waits_for_workers_and_is_orderly() {
    let mut rig = Rig::with_worker();
    assert!(!rig.hear(MS, 0, ToAgent::Shutdown { reason: "done".into() }).iter().any(is_exit));
    // Nothing new is begun.
    assert!(rig.hear(2 * MS, 0, ToAgent::Discover).is_empty());
    let effects = rig.exited(3 * MS);
    assert!(says(&effects, |message| matches!(message, FromAgent::WorkerExited { .. })));
    assert!(matches!(effects.last(), Some(Effect::Exit { orderly: true, .. })));
}

#[test]
fn a_worker_that_speaks_garbage_or_of_the_future_is_given_up() {
    for future in [false, true] {
        let mut rig = Rig::with_worker();
        let event = if future {
            let generation = Generation { epoch: 0, sequence: 9 };
            let envelope = Box::new(rig.worker.seal(generation, FromWorker::Ready));
            Event::WorkerMessage { worker: device(), envelope, payload: Vec::new() }
        } else {
            Event::WorkerBroken { worker: device(), error: "garbage".into() }
        };
        let effects = rig.handle(MS, event);
        assert!(effects.iter().any(is_kill));
        let failed = |message: &FromAgent| {
            matches!(message, FromAgent::Forward { message: FromWorker::Failed { .. }, .. })
        };
        assert!(says(&effects, failed));
    }
}

#[test]
fn a_worker_that_ends_before_it_starts_is_killed_when_it_does() {
    let mut rig = Rig::new();
    rig.effects();
    rig.hear(0, 0, ToAgent::StartWorkers { workers: vec![start()] });
    rig.hear(1, 0, ToAgent::StopWorkers { workers: Vec::new(), grace_ns: 700 * MS });
    let (engine, modules) = ("torch".into(), Vec::new());
    let effects = rig.handle(2, Event::WorkerStarted { worker: device(), pid: 9, engine, modules });
    assert!(matches!(&effects[..], [kill] if is_kill(kill)), "{effects:?}");
}

#[test]
fn one_worker_a_device() {
    let mut rig = Rig::with_worker();
    let effects = rig.hear(1, 0, ToAgent::StartWorkers { workers: vec![start()] });
    let refused = |message: &FromAgent| {
        matches!(message, FromAgent::WorkerExited { exit: Exit::NotStarted { .. }, .. })
    };
    assert!(says(&effects, refused) && effects.len() == 1);
}

#[test]
fn heartbeats_carry_the_last_beats() {
    let mut rig = Rig::with_worker();
    let beat = WorkerBeat {
        now_ns: 5,
        step: 3,
        action: None,
        waits: false,
        since_ns: 1,
        completed: 2,
        memory_bytes: 1,
    };
    let envelope = Box::new(rig.worker.seal(Generation::default(), FromWorker::Beat(beat.clone())));
    rig.handle(MS, Event::WorkerMessage { worker: device(), envelope, payload: Vec::new() });
    let effects = rig.handle(500 * MS, Event::Tick { memory_bytes: 42 });
    assert!(says(&effects, |message| {
        matches!(message, FromAgent::Heartbeat { memory_bytes: 42, workers, .. }
            if workers.get(&device()) == Some(&beat))
    }));
}

#[test]
fn a_message_out_of_order_is_no_message_of_the_coordinator() {
    let mut rig = Rig::with_worker();
    rig.coordinator.seal(Generation::default(), ());
    let effects = rig.hear(1, 0, ToAgent::Discover);
    assert!(effects.iter().any(is_kill) && !effects.contains(&Effect::Discover));
}
