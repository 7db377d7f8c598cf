//! Progress on stderr: a few lines redrawn in place on a terminal, plain lines elsewhere.
//!
//! The cursor is never hidden and no mode of the terminal is changed, so that a process that is
//! killed leaves nothing to restore. What is drawn is a pure function of [`Progress`].

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write};
use std::time::{Duration, Instant};

use crate::metrics::StepRow;

/// Steps over which time left is estimated.
const PACE_STEPS: usize = 32;
/// Shortest time between two frames.
const FRAME: Duration = Duration::from_millis(100);
/// Shortest time between two plain lines.
const PLAIN: Duration = Duration::from_secs(5);
/// Widest frame: longer bars say nothing more.
const MAX_WIDTH: usize = 100;

/// What is known of a run's progress.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Progress {
    /// What is trained, for the first line.
    pub(crate) title: String,
    /// Steps of the whole run.
    pub(crate) steps: u64,
    /// Steps done.
    pub(crate) done: u64,
    /// The last step's loss, nats a token.
    pub(crate) loss: Option<f64>,
    /// The last held-out loss, nats a token.
    pub(crate) held_out: Option<f64>,
    /// The last step's tokens a second.
    pub(crate) tokens_per_second: Option<f64>,
    /// Each device's name and share of the last step in forward and backward.
    pub(crate) devices: Vec<(String, f64)>,
    /// When the newest steps ended, seconds.
    ends: VecDeque<f64>,
}

/// How lines may look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Style {
    /// Columns.
    pub(crate) width: usize,
    /// Rows.
    pub(crate) height: usize,
    /// Colours are wanted.
    pub(crate) color: bool,
    /// Block characters can be shown.
    pub(crate) unicode: bool,
}

impl Progress {
    /// A run of `steps` steps of which `done` are done.
    pub(crate) fn new(title: impl Into<String>, steps: u64, done: u64) -> Self {
        Self { title: title.into(), steps, done, ..Self::default() }
    }

    /// Takes up a step.
    pub(crate) fn step(&mut self, row: &StepRow) {
        self.done = row.step + 1;
        self.loss = Some(row.loss);
        self.tokens_per_second = Some(row.tokens_per_second);
        self.devices = row.devices.iter().map(|d| (d.device.to_string(), d.busy_share)).collect();
        self.ends.push_back(row.elapsed_seconds);
        if self.ends.len() > PACE_STEPS {
            self.ends.pop_front();
        }
    }

    /// Seconds until the last step at the pace of the newest ones, evaluations and checkpoints
    /// between them included.
    pub(crate) fn seconds_left(&self) -> Option<f64> {
        let (first, last) = (self.ends.front()?, self.ends.back()?);
        let intervals = self.ends.len() as f64 - 1.0;
        (intervals > 0.0).then(|| self.steps.saturating_sub(self.done) as f64 * (last - first) / intervals)
    }
}

/// The frame of a live display: at most `style.height` − 1 lines of at most `style.width` − 1
/// columns, colours not counted.
pub(crate) fn frame(progress: &Progress, style: Style) -> Vec<String> {
    let width = style.width.saturating_sub(1).clamp(1, MAX_WIDTH);
    let height = style.height.saturating_sub(1).max(1);
    let share = progress.done as f64 / progress.steps.max(1) as f64;
    let head = format!("{}  step {}/{}", progress.title, progress.done, progress.steps);
    let left = progress.seconds_left().map_or_else(String::new, |left| format!(" {} left", duration(left)));
    let count = format!(" {:>3.0} %{left}", (100.0 * share).floor());
    let room = width.saturating_sub(columns(&head) + columns(&count) + 2);
    let mut lines =
        vec![Line::default().plain(&head).plain("  ").bar(share, room.min(40), 32, style).plain(&count)];
    lines.push(Line::default().plain(&numbers(progress)));
    let label = progress.devices.iter().map(|(name, _)| columns(name)).max().unwrap_or(0).min(width / 2);
    for (name, busy) in &progress.devices {
        let name = cut(name, label);
        let pad = label.saturating_sub(columns(&name));
        let text = format!("  {name}{}  ", " ".repeat(pad));
        let count = format!(" {:>3.0} % busy", 100.0 * busy);
        let room = width.saturating_sub(columns(&text) + columns(&count));
        lines.push(Line::default().plain(&text).bar(*busy, room.min(40), 36, style).plain(&count));
    }
    if lines.len() > height {
        let hidden = lines.len() - height + 1;
        lines.truncate(height - 1);
        lines.push(Line::default().plain(&format!("  and {hidden} lines more")));
    }
    lines.into_iter().map(|line| line.finish(width, style)).collect()
}

/// One plain line.
pub(crate) fn plain(progress: &Progress) -> String {
    let mut text = format!("step {}/{}", progress.done, progress.steps);
    let numbers = numbers(progress);
    if !numbers.is_empty() {
        let _ = write!(text, "  {numbers}");
    }
    if let Some(left) = progress.seconds_left() {
        let _ = write!(text, "  {} left", duration(left));
    }
    if !progress.devices.is_empty() {
        let busy: Vec<String> =
            progress.devices.iter().map(|(name, busy)| format!("{name} {:.0} %", 100.0 * busy)).collect();
        let _ = write!(text, "  busy: {}", busy.join(", "));
    }
    text
}

/// `1 h 02 min`, `2 min 05 s`, `7 s`.
pub(crate) fn duration(seconds: f64) -> String {
    // A pace that is no number has no time left to tell.
    let whole = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { 0 };
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

fn numbers(progress: &Progress) -> String {
    let mut parts = Vec::new();
    if let Some(loss) = progress.loss {
        parts.push(format!("loss {loss:.4}"));
    }
    if let Some(loss) = progress.held_out {
        parts.push(format!("held-out {loss:.4}"));
    }
    if let Some(rate) = progress.tokens_per_second {
        parts.push(format!("{rate:.0} tokens/s"));
    }
    parts.join("  ")
}

/// Text with its columns, colours not counted.
#[derive(Debug, Default)]
struct Line {
    parts: Vec<(String, Option<u8>)>,
}

impl Line {
    fn plain(mut self, text: &str) -> Self {
        self.parts.push((text.into(), None));
        self
    }

    /// A bar of `width` columns, in eighths where blocks can be shown; none where it is too narrow.
    fn bar(mut self, share: f64, width: usize, color: u8, style: Style) -> Self {
        if width < 4 {
            return self;
        }
        let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
        let eighths = (share * (width * 8) as f64).round() as usize;
        let (mut filled, empty) = if style.unicode {
            let mut filled = "█".repeat(eighths / 8);
            filled.extend(" ▏▎▍▌▋▊▉".chars().nth(eighths % 8).filter(|c| *c != ' '));
            (filled, '░')
        } else {
            ("#".repeat((eighths + 4) / 8), '.')
        };
        let used = columns(&filled);
        if style.color {
            self.parts.push((std::mem::take(&mut filled), Some(color)));
        }
        filled.extend(std::iter::repeat_n(empty, width - used));
        self.parts.push((filled, None));
        self
    }

    fn finish(self, width: usize, style: Style) -> String {
        let mut text = String::new();
        let mut left = width;
        for (part, color) in self.parts {
            let part = cut(&part, left);
            left -= columns(&part);
            match color {
                Some(color) if style.color && !part.is_empty() => {
                    let _ = write!(text, "\x1b[{color}m{part}\x1b[0m");
                }
                _ => text.push_str(&part),
            }
        }
        text.truncate(text.trim_end().len());
        text
    }
}

fn columns(text: &str) -> usize {
    text.chars().count()
}

fn cut(text: &str, width: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(width).collect()
}

/// Shows [`Progress`] while a run goes on.
pub(crate) struct Display {
    progress: Progress,
    out: Box<dyn Write + Send>,
    mode: Mode,
    last: Option<Instant>,
    /// Whether what is known has been shown.
    is_shown: bool,
}

enum Mode {
    /// Redrawn in place; columns of each line that stands there.
    Live { style: Box<dyn Fn() -> Style + Send>, drawn: Vec<usize> },
    /// One line now and then.
    Plain,
}

impl Display {
    /// On stderr, live where that is a terminal.
    pub(crate) fn stderr(progress: Progress) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let mode = if std::io::stderr().is_terminal() && !dumb {
            Mode::Live { style: Box::new(stderr_style), drawn: Vec::new() }
        } else {
            Mode::Plain
        };
        Self { progress, out: Box::new(std::io::stderr()), mode, last: None, is_shown: false }
    }

    /// Takes up a step and shows it when it is time.
    pub(crate) fn step(&mut self, row: &StepRow) {
        self.progress.step(row);
        self.is_shown = false;
        self.tick();
    }

    /// Takes up a held-out loss.
    pub(crate) fn evaluated(&mut self, loss: f64) {
        self.progress.held_out = Some(loss);
        self.is_shown = false;
        self.tick();
    }

    /// Shows what stands, when it is time.
    pub(crate) fn tick(&mut self) {
        let pause = if matches!(self.mode, Mode::Plain) { PLAIN } else { FRAME };
        if self.last.is_none_or(|last| last.elapsed() >= pause) {
            self.show();
        }
    }

    /// A line for people that stays, above a live display.
    pub(crate) fn message(&mut self, text: &str) {
        let clear = self.clear();
        // Progress is no reason to end a run: what stderr does not take is lost.
        drop(writeln!(self.out, "{clear}{text}"));
        if matches!(self.mode, Mode::Live { .. }) {
            self.show();
        }
    }

    /// Shows the last state, where a plain line has not done so already.
    pub(crate) fn finish(mut self) {
        if !self.is_shown || matches!(self.mode, Mode::Live { .. }) {
            self.show();
        }
    }

    fn show(&mut self) {
        self.last = Some(Instant::now());
        self.is_shown = true;
        let mut text = self.clear();
        match &mut self.mode {
            Mode::Plain => text = plain(&self.progress) + "\n",
            Mode::Live { style, drawn } => {
                let style = style();
                let bare = Style { color: false, ..style };
                *drawn = frame(&self.progress, bare).iter().map(|line| columns(line)).collect();
                for line in frame(&self.progress, style) {
                    text.push_str(&line);
                    text.push('\n');
                }
            }
        }
        drop(self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()));
    }

    /// What takes the last frame away. A terminal that became narrower has wrapped its lines.
    fn clear(&mut self) -> String {
        let Mode::Live { style, drawn } = &mut self.mode else { return String::new() };
        let width = style().width.max(1);
        let rows: usize = drawn.drain(..).map(|line| line.div_ceil(width).max(1)).sum();
        if rows == 0 { String::new() } else { format!("\r\x1b[{rows}A\x1b[J") }
    }
}

fn stderr_style() -> Style {
    let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok();
    let or = |found: Option<u16>, default| found.filter(|n| *n > 0).map_or(default, usize::from);
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG")).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    Style {
        width: or(size.as_ref().map(|s| s.ws_col), 80),
        height: or(size.as_ref().map(|s| s.ws_row), 24),
        color: set("NO_COLOR").is_none(),
        unicode: locale.contains("utf-8") || locale.contains("utf8"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::DeviceRow;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    fn row(step: u64) -> StepRow {
        let device = |name: &str, busy_share| DeviceRow {
            device: hgct_core::ids::DeviceId::new(name).unwrap(),
            busy_share,
            exchange_seconds: 0.0,
            exposed_communication_seconds: 0.0,
            memory_bytes: 0,
        };
        StepRow {
            step,
            loss: 3.456_78,
            grad_norm: 1.0,
            learning_rate: 1e-3,
            skipped: false,
            tokens: 4096,
            step_seconds: 0.5,
            tokens_per_second: 8192.4,
            devices: vec![device("local/torch:0", 0.953), device("local/jax:0", 0.5)],
            elapsed_seconds: 0.5 * (step + 1) as f64,
        }
    }

    fn progress() -> Progress {
        let mut progress = Progress::new("quickstart", 400, 0);
        (90..100).for_each(|step| progress.step(&row(step)));
        progress.held_out = Some(3.5);
        progress
    }

    const STYLE: Style = Style { width: 80, height: 24, color: false, unicode: true };

    #[test]
    fn a_frame_is_its_golden_text() {
        let golden = "\
quickstart  step 100/400  ███████▊░░░░░░░░░░░░░░░░░░░░░░░  25 % 2 min 30 s left
loss 3.4568  held-out 3.5000  8192 tokens/s
  local/torch:0  ██████████████████████████████████████▏░  95 % busy
  local/jax:0    ████████████████████░░░░░░░░░░░░░░░░░░░░  50 % busy";
        assert_eq!(frame(&progress(), STYLE).join("\n"), golden);
    }

    #[test]
    fn without_blocks_and_with_colour_the_frame_is_its_golden_text() {
        let style = Style { width: 50, height: 24, color: true, unicode: false };
        let golden = "\
quickstart  step 100/400    25 % 2 min 30 s left
loss 3.4568  held-out 3.5000  8192 tokens/s
  local/torch:0  \x1b[36m####################\x1b[0m.  95 % busy
  local/jax:0    \x1b[36m###########\x1b[0m..........  50 % busy";
        assert_eq!(frame(&progress(), style).join("\n"), golden);
    }

    #[test]
    fn a_plain_line_is_its_golden_text() {
        assert_eq!(
            plain(&progress()),
            "step 100/400  loss 3.4568  held-out 3.5000  8192 tokens/s  2 min 30 s left  \
             busy: local/torch:0 95 %, local/jax:0 50 %"
        );
        assert_eq!(plain(&Progress::new("x", 7, 2)), "step 2/7");
    }

    proptest! {
        #[test]
        fn a_frame_fits_any_terminal(width in 0usize..200, height in 0usize..12, unicode: bool, color: bool, busy in -1.0f64..2.0) {
            let mut progress = progress();
            progress.devices.push(("n/ä:7".into(), busy));
            let lines = frame(&progress, Style { width, height, color, unicode });
            prop_assert!(lines.len() < height.max(2));
            for line in lines {
                let bare = line.replace("\x1b[36m", "").replace("\x1b[32m", "").replace("\x1b[0m", "");
                prop_assert!(columns(&bare) < width.max(2), "{}", bare);
                prop_assert!(color || bare == line);
            }
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_message_stays_above_the_frame_and_the_frame_is_taken_away_whole() {
        let sink = Sink::default();
        let mode = Mode::Live { style: Box::new(|| STYLE), drawn: Vec::new() };
        let mut display =
            Display { progress: progress(), out: Box::new(sink.clone()), mode, last: None, is_shown: false };
        display.tick();
        display.message("checkpoint of step 100");
        display.finish();
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let frame = frame(&progress(), STYLE).join("\n") + "\n";
        let clear = "\r\x1b[4A\x1b[J";
        assert_eq!(text, format!("{frame}{clear}checkpoint of step 100\n{frame}{clear}{frame}"));
    }

    #[test]
    fn plain_lines_come_at_most_every_few_seconds_and_messages_at_once() {
        let sink = Sink::default();
        let mut display = Display {
            progress: progress(),
            out: Box::new(sink.clone()),
            mode: Mode::Plain,
            last: None,
            is_shown: false,
        };
        (100..200).for_each(|step| display.step(&row(step)));
        display.message("hello");
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.starts_with("step 101/400") && text.ends_with("hello\n"), "{text}");
    }
}
