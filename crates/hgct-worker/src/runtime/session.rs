//! The orders of an agent, one after the other.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use hgct_comm::{
    Communicator, ConnectOptions, Deadline, Endpoint, Guard, GuardOptions, Listener, Peer, RunKey, Tuning,
};
use hgct_control::message::{EndpointSpec, FromWorker, PeerSpec, StepReport, ToWorker, WorkerOptions};
use hgct_core::canonical::Hash;
use hgct_core::ids::{DeviceId, Generation, Rank};
use hgct_core::job::Recipe;
use hgct_core::plan::Plan;
use hgct_core::profile::LinkProfile;
use hgct_core::timeline::RankTimeline;
use hgct_data::TokenFile;

use super::pipe::{Pipe, locked};
use super::{is_set, shard};
use crate::engine::Engine;
use crate::memory;
use crate::train::{Progress, StepOutcome, Trainer, TrainerOptions};
use crate::{Error, Result, conformance, profiling};

/// What a worker knows between orders.
pub(super) struct Session {
    pipe: Arc<Mutex<Pipe>>,
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    attach: ToWorker,
    listener: Option<Listener>,
    /// Refuses whoever knocks while no mesh is made.
    guard: Option<Guard>,
    /// The engine, while no trainer has it.
    engine: Option<Box<dyn Engine>>,
    loaded: Option<Loaded>,
    /// Connections of a generation without a plan, for measuring links.
    links: Option<(Communicator, Vec<PeerSpec>)>,
    writer: Option<JoinHandle<Result<()>>>,
}

/// A generation that was loaded.
struct Loaded {
    trainer: Trainer,
    generation: Generation,
    options: WorkerOptions,
}

impl Session {
    pub(super) fn new(
        pipe: Arc<Mutex<Pipe>>,
        progress: Arc<Progress>,
        stop: Arc<AtomicBool>,
        attach: ToWorker,
    ) -> Self {
        Self {
            pipe,
            progress,
            stop,
            attach,
            listener: None,
            guard: None,
            engine: None,
            loaded: None,
            links: None,
            writer: None,
        }
    }

    /// The engine is there: listens for data connections and says hello.
    pub(super) fn open(&mut self, engine: Box<dyn Engine>) -> Result<()> {
        let ToWorker::Attach { listen, advertise, .. } = &self.attach else {
            return Err(self.unfit("attach"));
        };
        let listener = Listener::bind(listen)?;
        let seen: Vec<Endpoint> = if advertise.is_empty() {
            listener.endpoints()
        } else {
            advertise.iter().flat_map(|address| listener.endpoints_at(*address)).collect()
        };
        let endpoints = seen
            .into_iter()
            .map(|e| EndpointSpec {
                address: e.address,
                nic: e.nic,
                rate_bytes_per_s: e.rate_bytes_per_s,
                numa: e.numa,
            })
            .collect();
        let description = engine.describe().clone();
        self.listener = Some(listener);
        self.engine = Some(engine);
        self.say(FromWorker::Hello { description, endpoints })
    }

    /// Carries an order out.
    pub(super) fn obey(&mut self, order: ToWorker, payload: &[u8], generation: Generation) -> Result<()> {
        self.progress.rest();
        match order {
            ToWorker::Attach { .. } => Err(self.unfit("a second attach")),
            ToWorker::Stop | ToWorker::Exit => Ok(()),
            ToWorker::Check { kind, budget_ns } => {
                let device = self.device()?.clone();
                let report = conformance::run(self.engine()?, device, kind, Duration::from_nanos(budget_ns));
                // An engine that cannot unload is told of by the report, or by what comes next.
                let _ = self.engine()?.load(&[]);
                memory::give_back();
                self.say(FromWorker::Checked { report })
            }
            ToWorker::Profile { model, seq_len, micro_batches, kind, environment_hash, grant, budget_ns } => {
                let request = profiling::Request {
                    device: self.device()?.clone(),
                    kind,
                    environment_hash,
                    grant,
                    model,
                    seq_len,
                    micro_batches,
                    budget: Duration::from_nanos(budget_ns),
                };
                let profile = profiling::run(self.engine()?, &request)?;
                memory::give_back();
                self.say(FromWorker::Profiled { profile })
            }
            ToWorker::Load { generation, rank, plan, recipe, train_tokens, held_out_tokens, options } => {
                self.load(generation, rank, *plan, recipe, &train_tokens, held_out_tokens.as_ref(), options)
            }
            ToWorker::TrainAlone { plan, recipe, train_tokens, warm_up_steps, budget_ns } => {
                self.train_alone(*plan, recipe, &train_tokens, warm_up_steps, Duration::from_nanos(budget_ns))
            }
            ToWorker::Connect { peers, deadline_ns } => {
                self.connect(generation, peers, Duration::from_nanos(deadline_ns))
            }
            ToWorker::MeasureLinks => self.measure_links(),
            ToWorker::State { slice, role } => {
                let values = floats(payload).ok_or_else(|| self.unfit("state whose payload is no floats"))?;
                self.loaded(generation)?.trainer.restore(&slice, role, &values)
            }
            ToWorker::Start { step, num_updates, end_step } => {
                self.train(generation, step, num_updates, end_step)
            }
            ToWorker::Generate { prompts, num_tokens, seed, temperature } => {
                let trainer = &mut self.loaded(generation)?.trainer;
                let sequences =
                    trainer.generate(&prompts, num_tokens, seed, temperature)?.unwrap_or_default();
                self.say(FromWorker::Generated { sequences })
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of the order, taken apart once")]
    fn load(
        &mut self,
        generation: Generation,
        rank: Rank,
        plan: Plan,
        recipe: Recipe,
        train: &Hash,
        held_out: Option<&Hash>,
        options: WorkerOptions,
    ) -> Result<()> {
        self.join_writer()?;
        let engine = self.take_engine()?;
        memory::give_back();
        memory::begin_peak();
        let trainer = Trainer::load(
            engine,
            TrainerOptions {
                plan: Arc::new(plan),
                rank,
                recipe,
                train: TokenFile::open(&self.blob(train)?)?,
                held_out: held_out
                    .map(|hash| TokenFile::open(&self.blob(hash)?).map_err(Error::from))
                    .transpose()?,
                step_deadline: Duration::from_nanos(options.step_deadline_ns),
                progress: Arc::clone(&self.progress),
            },
        )?;
        self.loaded = Some(Loaded { trainer, generation, options });
        locked(&self.pipe).enter(generation);
        self.say(FromWorker::Loaded)
    }

    /// Trains a one-rank plan and gives the engine back as it was: nothing loaded.
    fn train_alone(
        &mut self,
        plan: Plan,
        recipe: Recipe,
        train: &Hash,
        warm_up_steps: u64,
        budget: Duration,
    ) -> Result<()> {
        if plan.ranks.len() != 1 {
            return Err(self.unfit("a plan of several ranks for training alone"));
        }
        self.join_writer()?;
        let engine = self.take_engine()?;
        memory::give_back();
        memory::begin_peak();
        let options = TrainerOptions {
            plan: Arc::new(plan),
            rank: Rank(0),
            recipe,
            train: TokenFile::open(&self.blob(train)?)?,
            held_out: None,
            step_deadline: Duration::from_mins(10),
            progress: Arc::clone(&self.progress),
        };
        let mut trainer = Trainer::load(engine, options)?;
        trainer.initialise(0, 0)?;
        let mut steps = Vec::new();
        let mut counted = Duration::ZERO;
        for step in 0.. {
            let outcome = trainer.step(step, false)?;
            if step >= warm_up_steps {
                counted += Duration::from_nanos(outcome.step_ns);
                steps.push(step_report(step, &outcome, &self.rank_timeline(Rank(0), &outcome)?));
            }
            if !steps.is_empty() && counted >= budget {
                break;
            }
        }
        self.engine = Some(trainer.into_engine()?);
        self.say(FromWorker::TrainedAlone { steps })
    }

    /// Connects with the ranks of a generation: that of the loaded plan, or one of its own, in which
    /// links are measured.
    fn connect(&mut self, generation: Generation, peers: Vec<PeerSpec>, within: Duration) -> Result<()> {
        let device = self.device()?;
        let me = peers.iter().find(|peer| peer.device == *device).map(|peer| peer.rank);
        let me = me.ok_or_else(|| self.unfit("connect without this worker"))?;
        let loaded = self.loaded.as_ref().filter(|loaded| loaded.generation == generation);
        let options = loaded.map(|loaded| loaded.options.clone());
        self.guard = None;
        let comm = if peers.len() > 1 {
            Some(self.mesh(generation, me, &peers, within, options.as_ref())?)
        } else {
            None
        };
        self.guard = Some(self.guarded(generation, me, &peers)?);
        match (&mut self.loaded, options) {
            (Some(loaded), Some(_)) => {
                if let Some(comm) = comm {
                    loaded.trainer.connect(comm);
                }
            }
            _ => self.links = comm.map(|comm| (comm, peers)),
        }
        locked(&self.pipe).enter(generation);
        self.say(FromWorker::Connected)
    }

    fn mesh(
        &self,
        generation: Generation,
        me: Rank,
        peers: &[PeerSpec],
        within: Duration,
        options: Option<&WorkerOptions>,
    ) -> Result<Communicator> {
        let key = self.run_key()?;
        let run = locked(&self.pipe).run().clone();
        let listener = self.listener.as_ref().ok_or_else(|| self.unfit("connect before hello"))?;
        let endpoint = |e: &EndpointSpec| Endpoint {
            address: e.address,
            rate_bytes_per_s: e.rate_bytes_per_s,
            nic: e.nic.clone(),
            numa: e.numa,
        };
        let member = |peer: &PeerSpec| Peer {
            rank: peer.rank,
            host_id: peer.node.to_string(),
            endpoints: peer.endpoints.iter().map(endpoint).collect(),
        };
        Ok(Communicator::connect(&ConnectOptions {
            group: peers.iter().map(member).collect(),
            me,
            generation,
            run,
            key,
            listener,
            deadline: Deadline::after(within),
            shared_memory: options.is_none_or(|options| options.shared_memory),
            test_delay_ns: options.map_or(0, |options| options.wire_delay_ns),
            tuning: Tuning::default(),
        })?)
    }

    fn run_key(&self) -> Result<RunKey> {
        let ToWorker::Attach { run_key, .. } = &self.attach else { return Err(self.unfit("attach")) };
        parse_key(run_key).ok_or_else(|| self.unfit("a run key that is no key"))
    }

    fn guarded(&self, generation: Generation, me: Rank, peers: &[PeerSpec]) -> Result<Guard> {
        let listener = self.listener.as_ref().ok_or_else(|| self.unfit("connect before hello"))?;
        let members = peers.iter().map(|peer| peer.rank).collect();
        let (run, key) = (locked(&self.pipe).run().clone(), self.run_key()?);
        let options = GuardOptions { listener, me, members, generation, run, key };
        Guard::start(options, |address, why| {
            eprintln!("hgct worker: refused a connection of {address}: {why}");
        })
        .map_err(|source| Error::File {
            operation: "start",
            path: "the guard's thread".into(),
            source,
        })
    }

    /// Pair after pair measures its link from both ends, in the same order on every rank.
    fn measure_links(&mut self) -> Result<()> {
        let from = self.device()?.clone();
        let mut links = Vec::new();
        if let Some((comm, peers)) = self.links.take() {
            let me = comm.rank();
            for (low, a) in peers.iter().enumerate() {
                for b in &peers[low + 1..] {
                    let other = if a.rank == me {
                        b
                    } else if b.rank == me {
                        a
                    } else {
                        continue;
                    };
                    let deadline = Deadline::after(Duration::from_secs(20));
                    let measured = comm.measure_link(other.rank, deadline)?;
                    links.push(LinkProfile {
                        from: from.clone(),
                        to: other.device.clone(),
                        transport: comm.transport_to(other.rank)?.to_owned(),
                        latency_ns: measured.latency_ns,
                        bytes_per_s: measured.bytes_per_s,
                    });
                    self.progress.alive();
                }
            }
            // Nobody leaves while others still measure.
            comm.barrier(0, Deadline::after(Duration::from_mins(1)))?;
            comm.close(Deadline::after(Duration::from_secs(2)));
        }
        self.say(FromWorker::LinksMeasured { links })
    }

    /// Trains until `end_step` or until the ranks agree to stop.
    fn train(&mut self, generation: Generation, start: u64, num_updates: u64, end_step: u64) -> Result<()> {
        self.loaded(generation)?.trainer.initialise(start, num_updates)?;
        // A beat between here and the first action must not count from the worker's first day.
        self.progress.rest();
        self.say(FromWorker::Ready)?;
        let mut step = start;
        let mut stopped = false;
        let mut skipped_in_a_row = 0;
        while step < end_step && !stopped {
            let stop = is_set(&self.stop);
            let loaded = self.loaded(generation)?;
            let outcome = loaded.trainer.step(step, stop)?;
            let recipe = loaded.trainer.recipe().clone();
            stopped = outcome.stop;
            skipped_in_a_row = if outcome.skipped { skipped_in_a_row + 1 } else { 0 };
            self.report(step, &outcome)?;
            step += 1;
            if skipped_in_a_row >= MAX_SKIPPED {
                // The coordinator counts too and ends the run; what is not finite is not saved.
                return self.say(FromWorker::Finished { step, stopped: true });
            }
            let last = step == end_step || stopped;
            if last || (recipe.evaluate_every > 0 && step.is_multiple_of(recipe.evaluate_every)) {
                self.evaluate(generation, step)?;
            }
            let due = recipe.checkpoint_every > 0 && step.is_multiple_of(recipe.checkpoint_every);
            let wanted = self.loaded(generation)?.options.final_checkpoint && last;
            // A skipped step changed nothing, so its state is as good as the one before.
            if due || wanted {
                self.checkpoint(generation, step)?;
            }
        }
        self.join_writer()?;
        self.say(FromWorker::Finished { step, stopped })
    }

    fn report(&mut self, step: u64, outcome: &StepOutcome) -> Result<()> {
        let Some(loaded) = &self.loaded else { return Err(self.unfit("a report without a plan")) };
        let every = loaded.options.timeline_every;
        let timeline = self.rank_timeline(loaded.trainer.rank(), outcome)?;
        let report = step_report(step, outcome, &timeline);
        if every > 0 && step.is_multiple_of(every) {
            let RankTimeline { actions, transfers, .. } = timeline;
            self.say(FromWorker::Spans { step, actions, transfers })?;
        }
        self.say(FromWorker::StepDone(report))
    }

    fn rank_timeline(&self, rank: Rank, outcome: &StepOutcome) -> Result<RankTimeline> {
        Ok(RankTimeline {
            rank,
            device: self.device()?.clone(),
            clock_offset_ns: 0,
            clock_uncertainty_ns: 0,
            actions: outcome.actions.clone(),
            transfers: outcome.transfers.clone(),
        })
    }

    fn evaluate(&mut self, generation: Generation, step: u64) -> Result<()> {
        let trainer = &mut self.loaded(generation)?.trainer;
        let rank = trainer.rank();
        match trainer.evaluate(step)? {
            Some((loss_sum, num_tokens)) if rank == Rank(0) => {
                self.say(FromWorker::Evaluated { step, loss_sum, num_tokens })
            }
            _ => Ok(()),
        }
    }

    /// Lets a thread write owned state out while training goes on.
    fn checkpoint(&mut self, generation: Generation, step: u64) -> Result<()> {
        self.join_writer()?;
        let trainer = &self.loaded(generation)?.trainer;
        let (snapshot, num_updates) = (trainer.snapshot(), trainer.num_updates());
        if snapshot.entries.is_empty() {
            return Ok(());
        }
        let pipe = Arc::clone(&self.pipe);
        let writer = std::thread::Builder::new()
            .name("hgct-checkpoint".into())
            .spawn(move || shard::write(&pipe, snapshot, step, num_updates))
            .map_err(|source| Error::File { operation: "start", path: "checkpoint thread".into(), source })?;
        self.writer = Some(writer);
        Ok(())
    }

    fn join_writer(&mut self) -> Result<()> {
        match self.writer.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(self.unfit("a panic of the checkpoint thread")),
        }
    }

    fn blob(&self, hash: &Hash) -> Result<PathBuf> {
        let ToWorker::Attach { blobs, .. } = &self.attach else { return Err(self.unfit("attach")) };
        Ok(PathBuf::from(blobs).join(hash.as_str()))
    }

    fn device(&self) -> Result<&DeviceId> {
        match &self.attach {
            ToWorker::Attach { device, .. } => Ok(device),
            _ => Err(self.unfit("attach")),
        }
    }

    /// The engine for another load: from the trainer that has it, whose connections end.
    fn take_engine(&mut self) -> Result<Box<dyn Engine>> {
        match self.loaded.take() {
            Some(loaded) => loaded.trainer.into_engine(),
            None => self.engine.take().ok_or_else(|| self.unfit("a load before the engine is open")),
        }
    }

    fn engine(&mut self) -> Result<&mut dyn Engine> {
        match &mut self.engine {
            Some(engine) => Ok(engine.as_mut()),
            None => Err(Error::Orders { message: "the engine is busy with a plan".into() }),
        }
    }

    /// What was loaded, unless the order belongs to another generation.
    fn loaded(&mut self, generation: Generation) -> Result<&mut Loaded> {
        let Some(loaded) = &mut self.loaded else {
            return Err(Error::Orders { message: "an order that needs a plan came before `load`".into() });
        };
        if loaded.generation != generation {
            let message = format!("an order of {generation} came, {} is loaded", loaded.generation);
            return Err(Error::Orders { message });
        }
        Ok(loaded)
    }

    fn say(&self, message: FromWorker) -> Result<()> {
        locked(&self.pipe).send(message, &[])
    }

    #[allow(clippy::unused_self, reason = "reads as the session's own complaint")]
    fn unfit(&self, what: &str) -> Error {
        Error::Orders { message: format!("{what} does not fit here") }
    }
}

/// Steps in a row without a finite loss and norm after which a run ends.
const MAX_SKIPPED: u32 = 3;

fn step_report(step: u64, outcome: &StepOutcome, timeline: &RankTimeline) -> StepReport {
    let exchange = timeline.actions.iter().filter(|span| !span.action.operation.has_micro_batch());
    StepReport {
        step,
        loss_sum: outcome.loss_sum,
        num_tokens: outcome.num_tokens,
        grad_norm: outcome.grad_norm,
        learning_rate: outcome.learning_rate,
        skipped: outcome.skipped,
        step_ns: outcome.step_ns,
        compute_ns: timeline.compute_ns(),
        exchange_ns: exchange.map(|span| span.end_ns - span.start_ns).sum(),
        exposed_communication_ns: timeline.exposed_communication_ns(),
        compute_cpu_ns: outcome.compute_cpu_ns,
        memory_bytes: memory::peak_bytes(),
    }
}

/// A key of 64 hex digits.
fn parse_key(hex: &str) -> Option<RunKey> {
    let mut key = [0; 32];
    if hex.len() != 2 * key.len() || !hex.is_ascii() {
        return None;
    }
    for (byte, digits) in key.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(RunKey(key))
}

fn floats(bytes: &[u8]) -> Option<Vec<f32>> {
    bytes
        .len()
        .is_multiple_of(4)
        .then(|| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}
