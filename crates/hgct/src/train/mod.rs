//! `hgct train`: discover → check → profile → plan → train → report, or what of it is not kept.

pub(crate) mod checkpoints;
mod lock;
mod observer;
mod resume;
mod text;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use hgct_checkpoint::Checkpoints;
use hgct_control::coordinator::{Command, LoadSpec, Outcome, Update};
use hgct_control::message::{FromWorker, ToWorker, WorkerOptions};
use hgct_core::canonical;
use hgct_core::cluster::{ClusterSpec, DeviceSpec};
use hgct_core::ids::{DeviceId, RunId};
use hgct_core::plan::Plan;
use hgct_core::timeline::Timeline;
use hgct_planner::{Budget, Explanation, PlanInput, Planned};

use self::checkpoints::{Head, Piece, Writer};
use self::lock::RunLock;
use self::observer::{Memory, Observer};
use self::resume::{BadRun, Resume};
use self::text::Text;
use crate::coordinator::Ended;
use crate::job::{LoadedJob, PreparedData};
use crate::report::summary::{Times, resume_command};
use crate::session::{self, Session};
use crate::stages::{Choices, Fleet};
use crate::workspace::{Workspace, write_atomically};

/// How agents are found.
#[derive(Debug, Clone, Args)]
pub(crate) struct AgentArgs {
    /// Wait for this many agents of other hosts
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = session::agents())]
    pub(crate) agents: u16,
    /// Do not start an agent on this host
    #[arg(long)]
    pub(crate) no_local_agent: bool,
    /// Where agents join; other hosts need an address that they can reach
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// The run's token, a file of mode 0600; made in the run's folder where none is given
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Seconds to wait for agents
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = session::seconds())]
    pub(crate) gather: u64,
}

/// Which devices take part.
#[derive(Debug, Clone, Args)]
pub(crate) struct DeviceArgs {
    /// A cluster document with grants, in place of what is discovered
    #[arg(long, value_name = "FILE")]
    pub(crate) cluster: Option<PathBuf>,
    /// Use devices that fail the check
    #[arg(long)]
    pub(crate) force: bool,
    /// Check and measure again what was kept
    #[arg(long)]
    pub(crate) fresh: bool,
}

/// `hgct train`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hgct train examples/quickstart/job.toml
  hgct train job.toml --data my-texts/
  hgct train job.toml --resume latest
  hgct train job.toml --agents 1 --listen 10.0.0.1:7070 --token-file token

Exit codes: 0 trained, or stopped with a checkpoint; 1 the run failed; 2 bad input; 130 stopped at once.")]
pub(crate) struct TrainArgs {
    /// The job
    job: PathBuf,
    /// Text in place of the job's own: a file, folder or pattern; may be repeated
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
    /// Train this plan in place of planning
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Continue a run from its newest checkpoint: its id, or `latest`
    #[arg(long, value_name = "RUN")]
    resume: Option<String>,
    /// Stop before this step, with a checkpoint
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
    until: Option<u64>,
    /// Seconds that a worker may take before its first action
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = session::seconds())]
    warming: u64,
    /// Id of the run, which is the name of its folder
    #[arg(long, value_name = "ID", conflicts_with = "resume")]
    run: Option<RunId>,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    agents: AgentArgs,
    /// Exchange over TCP even inside of a host
    #[arg(long)]
    no_shared_memory: bool,
    /// Compare the workers' memory in the report with plain loops of the same frameworks, measured
    /// after the run or kept from an earlier one
    #[arg(long)]
    plain_loops: bool,
    /// Every message between workers arrives this much later (for tests of overlap)
    #[arg(long, value_name = "MS", default_value_t = 0, hide = true)]
    wire_delay_ms: u64,
}

/// Deadline of a wait inside of a step where the plan predicts none.
const STEP_DEADLINE: Duration = Duration::from_secs(120);
/// Deadline of loading and connecting.
const LOAD_DEADLINE: Duration = Duration::from_secs(120);

pub(crate) fn run(workspace: &Workspace, args: &TrainArgs) -> Result<u8> {
    let begun = Instant::now();
    let started_at = crate::date::now();
    let loaded = LoadedJob::read(&args.job)?.with_data(&args.data)?;
    // Before anything is started or written.
    loaded.sources()?;
    let given = args.plan.as_deref().map(|path| given_plan(path, &loaded)).transpose()?;
    let found = args.resume.as_deref().map(|name| workspace.find_run(name)).transpose()?;
    let run = match (&found, &args.run) {
        (Some(found), _) => RunId::new(file_of(found))?,
        (None, Some(run)) => run.clone(),
        (None, None) => RunId::new(format!("{}-{}", crate::date::stamp(), file_name(&loaded.job.name)))?,
    };
    let folder = workspace.run(&run);
    let _lock = RunLock::take(&folder, &run)?;
    let resumed = found.map(|found| Resume::find(&found, &run, &loaded, args.until)).transpose()?;
    if resumed.is_none() && folder.join(Workspace::BEGUN).exists() {
        bail!(BadRun { run, reason: "exists already: give another id, or continue it with --resume".into() });
    }
    // The text is tokenized while devices are discovered and checked.
    let text = Text::prepare(loaded.clone(), workspace.clone());
    let mut config = session_options(run, folder.clone(), &args.agents);
    config.warming = Duration::from_secs(args.warming);
    let mut session = Session::open(workspace, &config).inspect_err(|_| {
        if resumed.is_none() {
            set_aside(workspace, &folder);
        }
    })?;
    let mut driver = Driver {
        workspace,
        args,
        loaded,
        resumed,
        given,
        folder,
        begun,
        started_at,
        times: Times { set_up: set_up_seconds(), ..Times::default() },
        observer: None,
        comparable: None,
    };
    let result = driver.drive(&mut session, text);
    let memory = Memory::of(&session);
    let outcome = session.close();
    driver.conclude(result, outcome, memory)
}

/// Options of a session from the command line.
pub(crate) fn session_options(run: RunId, folder: PathBuf, agents: &AgentArgs) -> session::Options {
    session::Options {
        run,
        folder,
        remote_agents: usize::from(agents.agents),
        local_agent: !agents.no_local_agent,
        listen: agents.listen,
        token_file: agents.token_file.clone(),
        gather: Duration::from_secs(agents.gather),
        warming: Duration::from_secs(120),
    }
}

struct Driver<'a> {
    workspace: &'a Workspace,
    args: &'a TrainArgs,
    loaded: LoadedJob,
    resumed: Option<Resume>,
    given: Option<Chosen>,
    folder: PathBuf,
    begun: Instant,
    started_at: String,
    times: Times,
    observer: Option<Observer>,
    /// Devices, plan and tokens of the run, for plain loops of the same.
    comparable: Option<(Vec<DeviceSpec>, Arc<Plan>, PathBuf)>,
}

impl Driver<'_> {
    fn drive(&mut self, session: &mut Session, text: Text) -> Result<()> {
        let choices = Choices {
            cluster: self.args.devices.cluster.clone(),
            devices: self.loaded.job.policy.devices.clone(),
            force: self.args.devices.force,
            fresh: self.args.devices.fresh,
            ..Choices::default()
        };
        let (mut fleet, _) = Fleet::discover(session, &choices)?;
        let text = text.look()?;
        let checking = Instant::now();
        fleet.check(session, self.workspace, &choices)?;
        self.times.check = Some(checking.elapsed().as_secs_f64());
        let text = match &self.resumed {
            // Planning writes over what the run has.
            Some(resume) => resume.check_text(text)?,
            None => text.look()?,
        };
        let chosen = self.plan(session, &mut fleet, &choices)?;
        let plan = Arc::new(chosen.plan.clone());
        let (data, seconds) = text.wait()?;
        self.times.data = Some(seconds);
        let meta = &data.prepared.meta;
        session.offer(&[
            (meta.train.sha256.clone(), data.prepared.train_path()),
            (meta.held_out.sha256.clone(), data.prepared.held_out_path()),
        ])?;
        let devices = used_devices(&fleet, &plan)?;
        let idle: Vec<DeviceId> = fleet
            .started
            .iter()
            .filter(|id| !devices.iter().any(|device| device.id == **id))
            .cloned()
            .collect();
        session.stop_workers(&idle)?;
        fleet.started.retain(|id| !idle.contains(id));
        fleet.start(session, &devices)?;
        used_devices(&fleet, &plan)?;
        fleet.hold(session)?;
        let resumed = self.resumed.as_ref().map(Resume::step);
        let mut observer = Observer::open(&self.folder, &session.run, &self.loaded, &fleet, &chosen, &data)?;
        observer.watch(resumed, self.end_step())?;
        let training = Instant::now();
        let result = self.train(session, &plan, chosen.timeline.as_ref(), &data, &mut observer);
        self.times.train = Some(training.elapsed().as_secs_f64());
        self.observer = Some(observer);
        self.comparable = Some((devices, plan, data.prepared.train_path()));
        result
    }

    /// The plan that was given, or the planner's choice under the profile.
    fn plan(&mut self, session: &mut Session, fleet: &mut Fleet, choices: &Choices) -> Result<Chosen> {
        let chosen = if let Some(given) = self.given.take() {
            given
        } else {
            let profiling = Instant::now();
            let profile =
                fleet.profile(session, self.workspace, &self.loaded.job, &self.loaded.model, choices)?;
            self.times.profile = Some(profiling.elapsed().as_secs_f64());
            let planning = Instant::now();
            let Planned { plan, explanation, timeline } = make_plan(&self.loaded, &fleet.cluster, &profile)?;
            self.times.plan = Some(planning.elapsed().as_secs_f64());
            write_document(&self.folder.join("profile.json"), &profile)?;
            eprintln!("{explanation}");
            Chosen { plan, explanation: Some(explanation), timeline: Some(timeline) }
        };
        // Written before the first step and never touched again.
        resume::write_plan(&self.folder, &chosen.plan)?;
        if let Some(timeline) = &chosen.timeline {
            write_document(&self.folder.join("predicted_timeline.json"), timeline)?;
        }
        if let Some(explanation) = &chosen.explanation {
            write_document(&self.folder.join("explanation.json"), explanation)?;
        }
        write_atomically(&self.folder.join("cluster.toml"), fleet.cluster.to_toml().as_bytes(), 0o644)?;
        Ok(chosen)
    }

    /// The step before which this run stops.
    fn end_step(&self) -> u64 {
        let steps = self.loaded.job.recipe.steps;
        self.args.until.unwrap_or(steps).min(steps)
    }

    fn train(
        &self,
        session: &mut Session,
        plan: &Arc<Plan>,
        timeline: Option<&Timeline>,
        data: &PreparedData,
        observer: &mut Observer,
    ) -> Result<()> {
        let recipe = self.loaded.job.recipe.clone();
        let meta = &data.prepared.meta;
        let end_step = self.end_step();
        let step_deadline = plan
            .prediction
            .as_ref()
            .map_or(STEP_DEADLINE, |p| STEP_DEADLINE.max(10 * Duration::from_nanos(p.step_ns)));
        session.shell.command(Command::Load(Box::new(LoadSpec {
            plan: (**plan).clone(),
            timeline: timeline.cloned(),
            recipe: recipe.clone(),
            train_tokens: meta.train.sha256.clone(),
            held_out_tokens: (meta.held_out_tokens > u64::from(plan.seq_len))
                .then(|| meta.held_out.sha256.clone()),
            options: WorkerOptions {
                shared_memory: !self.args.no_shared_memory,
                wire_delay_ns: self.args.wire_delay_ms * 1_000_000,
                step_deadline_ns: step_deadline.as_nanos() as u64,
                timeline_every: TIMELINE_EVERY,
                final_checkpoint: true,
            },
            deadline_ns: LOAD_DEADLINE.as_nanos() as u64,
        })))?;
        let generation = session.wait_for("loaded stages", LOAD_DEADLINE * 2, |update| match update {
            Update::Loaded { generation } => Some(generation),
            _ => None,
        })?;
        let (step, num_updates) = match &self.resumed {
            None => (0, 0),
            Some(resume) => {
                resume.send(session, plan)?;
                (resume.step(), resume.checkpoint.manifest().num_updates)
            }
        };
        let writer = Writer::start(
            &self.folder.join("checkpoints"),
            Head {
                run: session.run.clone(),
                generation,
                plan: Arc::clone(plan),
                tokenizer: Some(meta.tokenizer.sha256.clone()),
                keep: recipe.keep_checkpoints,
            },
        )?;
        session.shell.command(Command::Start {
            step,
            num_updates,
            end_step,
            deadline_ns: LOAD_DEADLINE.as_nanos() as u64,
        })?;
        let trained = Self::follow(session, &writer, observer);
        // What was handed over is written out even when the run fails: it may complete a checkpoint.
        let last = writer.finish();
        for done in last.as_deref().unwrap_or_default() {
            observer.checkpoint(done)?;
        }
        trained?;
        last?;
        Self::generate(session, plan, data, observer)
    }

    /// Hears the run until its last step.
    fn follow(session: &mut Session, writer: &Writer, observer: &mut Observer) -> Result<()> {
        loop {
            let update = session.shell.poll(Duration::from_millis(500))?;
            for done in writer.committed()? {
                observer.checkpoint(&done)?;
            }
            let Some(update) = update else {
                observer.tick();
                continue;
            };
            session.note(&update);
            match update {
                Update::StepCommitted { reports, .. } => observer.step(&reports)?,
                Update::StepSkipped { step, in_a_row } => observer.skipped(step, in_a_row)?,
                Update::Evaluated { step, loss_sum, num_tokens } => {
                    observer.evaluated(step, loss_sum, num_tokens)?;
                }
                Update::Spans { rank, step, clock, actions, transfers } => {
                    observer.spans(rank, step, clock, actions, transfers);
                }
                Update::ShardChunk { rank, step, num_updates, offset, end, bytes } => {
                    writer.piece(Piece { rank, step, num_updates, offset, end, bytes })?;
                }
                Update::Stopping => observer.event("stopping after this step")?,
                Update::Finished { step, stopped } => return observer.finished(step, stopped),
                _ => {}
            }
        }
    }

    /// A few lines that the model writes.
    fn generate(
        session: &mut Session,
        plan: &Plan,
        data: &PreparedData,
        observer: &mut Observer,
    ) -> Result<()> {
        let prompts = observer.prompts(data)?;
        if prompts.is_empty() {
            return Ok(());
        }
        let length = prompts.first().map_or(0, Vec::len) as u32;
        let num_tokens = (plan.seq_len.saturating_sub(length)).min(48);
        let pipeline = &plan.pipelines[0];
        let devices: Vec<DeviceId> = pipeline
            .stages
            .iter()
            .map(|stage| plan.ranks[plan.stage(*stage).rank().index()].device.clone())
            .collect();
        let head = devices.last().cloned();
        let requests = devices
            .into_iter()
            .map(|device| {
                (
                    device,
                    ToWorker::Generate { prompts: prompts.clone(), num_tokens, seed: 1, temperature: 0.8 },
                )
            })
            .collect();
        session.shell.command(Command::Ask { requests, deadline_ns: 60_000_000_000 })?;
        let mut written = Vec::new();
        session.wait_for("the model's lines", Duration::from_secs(65), |update| match update {
            Update::Answer { worker, answer: FromWorker::Generated { sequences } } => {
                if Some(&worker) == head.as_ref() {
                    written = sequences;
                }
                None
            }
            Update::Answered { .. } => Some(()),
            _ => None,
        })?;
        observer.generated(&prompts, &written, data)
    }

    /// Writes the report and says how it ended.
    fn conclude(mut self, result: Result<()>, outcome: Result<Outcome>, memory: Memory) -> Result<u8> {
        // A run that ended by itself comes as an error through the driver.
        let ended = match result.map_err(anyhow::Error::downcast::<Ended>) {
            Ok(()) => outcome,
            Err(Ok(Ended(outcome))) => Ok(outcome),
            Err(Err(error)) => Err(error),
        };
        let failed = match &ended {
            Ok(outcome) if ended_in_order(outcome) => None,
            Ok(outcome) => Some(outcome.to_string()),
            Err(error) => Some(format!("{error:#}")),
        };
        let Some(mut observer) = self.observer.take() else {
            // Nothing was trained: what was asked for cannot be done.
            if self.resumed.is_none() {
                set_aside(self.workspace, &self.folder);
            }
            return ended.and_then(|outcome| Err(Ended(outcome).into()));
        };
        self.times.total = Some(self.begun.elapsed().as_secs_f64());
        if let Some((devices, plan, tokens)) = self.comparable.take().filter(|_| self.args.plain_loops) {
            match crate::plain_loops::peaks(self.workspace, &devices, &plan, &tokens) {
                Ok(peaks) => observer.compared(peaks),
                // The run is what counts.
                Err(error) => eprintln!("hgct: no plain loops to compare memory with: {error:#}"),
            }
        }
        let reported = observer
            .close(memory, self.started_at.clone(), self.times.clone(), failed)
            .and_then(|()| crate::report::write(&self.folder));
        // A disk that is full must not hide why the run ended.
        match &reported {
            Ok(_) => eprintln!("the report is in {}", self.folder.join("report.md").display()),
            Err(error) => eprintln!("hgct: the report cannot be written: {error:#}"),
        }
        let error = match ended {
            Ok(outcome) if ended_in_order(&outcome) => return Ok(u8::from(reported.is_err())),
            Ok(Outcome::Aborted { reason }) => {
                eprintln!("hgct: stopped at once: {reason}");
                return Ok(130);
            }
            Ok(outcome @ Outcome::Stopped { .. }) => {
                eprintln!("hgct: {outcome}: no checkpoint was written");
                return Ok(130);
            }
            Ok(outcome) => outcome.to_string(),
            Err(error) => format!("{error:#}"),
        };
        eprintln!("hgct: the run failed: {error}");
        let checkpoints = Checkpoints::open(self.folder.join("checkpoints"));
        if checkpoints.steps().is_ok_and(|steps| !steps.is_empty()) {
            let job = self.args.job.to_string_lossy();
            let command = resume_command(&job, self.loaded.other_data(), &file_of(&self.folder));
            eprintln!("hgct: continue it from its newest checkpoint with: {command}");
        }
        Ok(1)
    }
}

/// Whether all was done, or a stop was carried out behind a checkpoint: one that comes while stages
/// load leaves none.
fn ended_in_order(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Completed | Outcome::Stopped { step: Some(_) })
}

/// What the set-up took before this command, where a script says so.
fn set_up_seconds() -> Option<f64> {
    std::env::var("HGCT_SET_UP_SECONDS").ok()?.parse().ok()
}

/// The plan of a run; with its reasons where the planner made it.
pub(crate) struct Chosen {
    pub(crate) plan: Plan,
    pub(crate) explanation: Option<Explanation>,
    pub(crate) timeline: Option<Timeline>,
}

/// Every so many steps workers send what they did.
const TIMELINE_EVERY: u64 = 4;

/// Plans a job on a fleet.
pub(crate) fn make_plan(
    loaded: &LoadedJob,
    cluster: &ClusterSpec,
    profile: &hgct_core::profile::Profile,
) -> Result<Planned> {
    let input = PlanInput { job: &loaded.job, model: &loaded.model, cluster, profile };
    hgct_planner::plan(&input, &Budget::default()).with_context(|| loaded.path.display().to_string())
}

/// A plan that a person gave, if it fits the job.
fn given_plan(path: &Path, loaded: &LoadedJob) -> Result<Chosen> {
    let plan = crate::layouts::read_plan(path, loaded)?;
    let fail = |what: &str| {
        Err(anyhow!(hgct_core::Error::Value {
            file: path.to_string_lossy().into_owned(),
            key: what.into(),
            found: "another one".into(),
            allowed: format!("that of {}", loaded.path.display()),
        }))
    };
    if plan.model != loaded.model {
        return fail("model");
    }
    if plan.seq_len != loaded.job.recipe.seq_len || plan.global_batch != loaded.job.recipe.global_batch {
        return fail("seq_len and global_batch");
    }
    Ok(Chosen { plan, explanation: None, timeline: None })
}

/// The devices of a plan; an error for one that is gone.
fn used_devices(fleet: &Fleet, plan: &Plan) -> Result<Vec<DeviceSpec>> {
    let find = |id: &DeviceId| {
        if let Some((_, device)) = fleet.cluster.device(id) {
            Ok(device.clone())
        } else {
            let reason = fleet.why_missing(id).unwrap_or("no agent has it");
            bail!("the plan needs {id}, which is not there: {reason}")
        }
    };
    plan.ranks.iter().map(|rank| find(&rank.device)).collect()
}

/// What never came to train is no run: `latest` must not find it, and its id is free again.
fn set_aside(workspace: &Workspace, folder: &Path) {
    if !folder.exists() {
        return;
    }
    match workspace.never_began(folder) {
        Ok(place) => eprintln!("hgct: nothing was trained; what was logged is in {}", place.display()),
        Err(error) => eprintln!("hgct: {error:#}"),
    }
}

fn write_document<T: serde::Serialize>(path: &Path, document: &T) -> Result<()> {
    write_atomically(path, canonical::encode(document).as_bytes(), 0o644)
}

fn file_of(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A job's name as part of a folder's name.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect()
}
