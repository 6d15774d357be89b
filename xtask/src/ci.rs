//! `cargo xtask ci`: what CI runs, step by step, and at the end a table of what each step took. Called by
//! `main`, for `.ci/run` and `.ci/nightly`.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{Write as _, stdout},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, bail};

use crate::{
    command::{run as run_command, say, target_dir},
    counts::Counts,
    image, kernels, rungs, sdks, setup, steps,
};

struct Step {
    name: &'static str,
    /// What it takes on two cores, in minutes; half as much again is reported.
    budget: u64,
    run: fn() -> Result<Counts>,
}

/// For every change: the sooner a step finds an error, the earlier it comes.
const EACH_CHANGE: [Step; 7] = [
    Step { name: "tools", budget: 10, run: tools },
    Step { name: "lint", budget: 3, run: || steps::lint().map(|()| Counts::default()) },
    Step { name: "tests", budget: 16, run: || rungs::test(true) },
    Step { name: "SDKs", budget: 9, run: || sdks::test(Some("node"), true) },
    Step { name: "image", budget: 6, run: || image::prove(image::Directories::One, true) },
    Step { name: "kernels", budget: 8, run: || kernels::test(kernels::Rows::Essential, &[], true) },
    Step { name: "reboot", budget: 4, run: kernels::reboot },
];

/// Once a night: what takes long and rarely fails.
const NIGHTLY: [Step; 6] = [
    Step { name: "tools", budget: 10, run: tools },
    Step { name: "advisories", budget: 1, run: steps::advisories },
    Step { name: "API server", budget: 15, run: rungs::test_on_api_server },
    Step { name: "SDKs", budget: 14, run: || sdks::test(None, true) },
    Step { name: "image, twice", budget: 22, run: || image::prove(image::Directories::Two, true) },
    Step { name: "kernels, all", budget: 75, run: || kernels::test(kernels::Rows::All, &[], true) },
];

/// How long the nightly run fuzzes.
const FUZZING: Duration = Duration::from_secs(3600);

/// Runs the steps for a change up to the first that fails; nightly all of them, and the fuzzer next to them.
pub(crate) fn run(nightly: bool) -> Result<()> {
    if !nightly {
        return perform(&EACH_CHANGE, None);
    }
    let fuzzing = Fuzzing::start()?;
    perform(&NIGHTLY, Some(fuzzing))
}

fn perform(steps: &[Step], fuzzing: Option<Fuzzing>) -> Result<()> {
    let mut done = Vec::new();
    let mut failure: Option<Error> = None;
    for step in steps {
        say(format!("CI: {}", step.name));
        let begun = Instant::now();
        let outcome = (step.run)();
        let took = begun.elapsed();
        let counts = outcome.as_ref().copied().unwrap_or(Counts { failed: 1, ..Counts::default() });
        done.push(Done { name: step.name, budget: Duration::from_secs(step.budget * 60), took, counts });
        if let Err(error) = outcome {
            let error = error.context(format!("step {:?} failed", step.name));
            say(format!("CI: {error:#}"));
            failure = failure.or(Some(error));
            if fuzzing.is_none() {
                break;
            }
        }
    }
    if let Some(fuzzing) = fuzzing {
        let begun = fuzzing.begun;
        let outcome = fuzzing.finish();
        let counts = outcome.as_ref().copied().unwrap_or(Counts { failed: 1, ..Counts::default() });
        done.push(Done { name: "fuzzing", budget: FUZZING + FUZZING / 10, took: begun.elapsed(), counts });
        failure = failure.or(outcome.err());
    }
    write!(stdout(), "{}", table(&done))?;
    match failure {
        Some(failure) => Err(failure),
        None if done.iter().map(|done| done.counts).sum::<Counts>().passed == 0 => bail!("no test ran"),
        None => Ok(()),
    }
}

/// The fuzzer in its own process, whose output goes to a file.
struct Fuzzing {
    begun: Instant,
    child: Child,
    log: PathBuf,
}

impl Fuzzing {
    fn start() -> Result<Self> {
        let log = target_dir().join("fuzzing.log");
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        // By what runs, not by its path: a build of the whole workspace may put another xtask there.
        let mut command = Command::new("/proc/self/exe");
        command.args(["fuzz", "--seconds", &FUZZING.as_secs().to_string()]);
        say(format!("CI: fuzzing, beside the other steps; see {}", log.display()));
        let child = command.stdin(Stdio::null()).stderr(file.try_clone()?).stdout(file).spawn()?;
        // It has no deadline, and the other steps' tests have.
        run_command(Command::new("renice").args(["-n", "19", "-p", &child.id().to_string()]))?;
        Ok(Self { begun: Instant::now(), child, log })
    }

    /// Waits for it, and shows where chance began; what was found, if something was.
    fn finish(mut self) -> Result<Counts> {
        say("CI: waiting for the fuzzer");
        let status = self.child.wait()?;
        let log = fs::read(&self.log)?;
        let log = String::from_utf8_lossy(&log);
        let seeds = log.lines().filter(|line| line.starts_with("INFO: Seed: "));
        seeds.for_each(|seed| say(format!("fuzzing: {seed}")));
        if status.success() {
            return Ok(Counts::passed(log.lines().filter(|line| line.starts_with("INFO: Seed: ")).count()));
        }
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(60)..].join("\n");
        bail!("the fuzzer found something ({status}):\n{tail}");
    }
}

fn tools() -> Result<Counts> {
    setup::everything().map(|()| Counts::default())
}

struct Done {
    name: &'static str,
    budget: Duration,
    took: Duration,
    counts: Counts,
}

/// Times and counts. The last line is the sum, alone.
fn table(done: &[Done]) -> String {
    let minutes = |time: Duration| format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60);
    let mut text = String::from("\n  STEP           TIME  BUDGET  TESTS\n");
    for Done { name, budget, took, counts } in done {
        let slow = if *took > *budget * 3 / 2 { "  SLOW: over its budget by half" } else { "" };
        let (took, budget) = (minutes(*took), minutes(*budget));
        let _infallible = writeln!(text, "  {name:<12} {took:>6}  {budget:>6}  {counts}{slow}");
    }
    let all = minutes(done.iter().map(|done| done.took).sum());
    let counts: Counts = done.iter().map(|done| done.counts).sum();
    let _infallible = writeln!(text, "  {:<12} {all:>6}\n\n{counts}", "all");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_slow_steps_and_ends_with_the_sum_alone() {
        let done = |name, minutes: u64, passed| Done {
            name,
            budget: Duration::from_secs(600),
            took: Duration::from_secs(minutes * 60 + 1),
            counts: Counts::passed(passed),
        };

        let text = table(&[done("lint", 15, 0), done("tests", 14, 7)]);

        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[2],
            "  lint          15:01   10:00  0 passed, 0 failed  SLOW: over its budget by half"
        );
        assert_eq!(lines[3], "  tests         14:01   10:00  7 passed, 0 failed");
        assert_eq!(*lines.last().unwrap(), "7 passed, 0 failed");
    }
}
