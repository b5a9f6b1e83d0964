//! The contenders, and the processes they run in.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use bench_work::protocol::{self, Answer, Done, Extra, Kind, Memory, Opening, Work};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::qemu;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Contender {
    Raw,
    Library,
    #[serde(rename = "qcow2-rs")]
    Qcow2Rs,
    #[serde(rename = "qcow2-rs uring")]
    Qcow2RsUring,
    #[serde(rename = "imago")]
    ImagoSync,
    #[serde(rename = "imago async")]
    ImagoAsync,
    #[serde(rename = "QEMU")]
    Qemu,
}

use Contender::{ImagoAsync, ImagoSync, Library, Qcow2Rs, Qcow2RsUring, Qemu, Raw};

impl Contender {
    /// Who takes part in rows of synchronous calls.
    pub const ALL: [Self; 6] = [Raw, Library, Qcow2Rs, ImagoSync, ImagoAsync, Qemu];

    pub fn name(self) -> &'static str {
        match self {
            Raw => "raw",
            Library => "libqcowrecycle",
            Qcow2Rs => "qcow2-rs",
            Qcow2RsUring => "qcow2-rs uring",
            ImagoSync => "imago",
            ImagoAsync => "imago async",
            Qemu => "QEMU",
        }
    }

    /// Of the file names of its images.
    pub fn slug(self) -> String {
        self.name().replace(' ', "-")
    }

    /// Peers may be left out; the library and the raw file may not.
    pub fn optional(self) -> bool {
        !matches!(self, Raw | Library)
    }

    /// Whether it can be run here.
    pub fn built(self) -> bool {
        self.command().is_ok()
    }

    pub fn command(self) -> Result<Command> {
        let (program, argument) = match self {
            Raw => ("bench-library", Some("raw")),
            Library => ("bench-library", Some("library")),
            Qcow2Rs => ("bench-qcow2-rs", Some("sync")),
            Qcow2RsUring => ("bench-qcow2-rs", Some("uring")),
            ImagoSync => ("bench-imago-sync", None),
            ImagoAsync => ("bench-imago-async", None),
            Qemu => bail!("QEMU is run by qemu.rs"),
        };
        let program = programs()?.join(program);
        if !program.exists() {
            bail!("{} has not been built", program.display());
        }
        let mut command = Command::new(program);
        command.args(argument);
        if matches!(self, Qcow2Rs | Qcow2RsUring) {
            // It says there that it read less than it asked for.
            command.stderr(Stdio::null());
        }
        Ok(command)
    }
}

/// Where the contenders' programs are: where BENCH_PROGRAMS says, or beside this one.
pub fn programs() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("BENCH_PROGRAMS") {
        return Ok(folder.into());
    }
    let this = std::env::current_exe()?;
    this.parent().map(Path::to_owned).context("a program in no directory")
}

/// A contender at work.
pub struct Process {
    contender: Contender,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// What opening took, in nanoseconds.
    pub opened: u64,
}

impl Process {
    pub fn open(contender: Contender, opening: &Opening) -> Result<Self> {
        Self::open_in(contender, contender.command()?, opening)
    }

    /// In a process that `command` starts: a tracer, for instance.
    pub fn open_in(contender: Contender, mut command: Command, opening: &Opening) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context(contender.name())?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let output = BufReader::new(output.context("no standard output")?);
        let mut process = Self { contender, child, input, output, opened: 0 };
        match process.ask(&protocol::Command::Open(opening.clone()))? {
            Answer::Opened { nanoseconds } => process.opened = nanoseconds,
            other => bail!("{}: {other:?}", contender.name()),
        }
        Ok(process)
    }

    fn ask(&mut self, command: &protocol::Command) -> Result<Answer> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        let input = self.input.as_mut().context("no standard input")?;
        input.write_all(&line).and_then(|()| input.flush()).with_context(|| self.contender.name())?;
        let mut answer = String::new();
        if self.output.read_line(&mut answer)? == 0 {
            bail!("{} has ended: {:?}", self.contender.name(), self.child.wait()?);
        }
        match serde_json::from_str(&answer)? {
            Answer::Failed(message) => Err(anyhow!("{}: {message}", self.contender.name())),
            answer => Ok(answer),
        }
    }

    pub fn run(&mut self, work: &Work) -> Result<Done> {
        match self.ask(&protocol::Command::Run(work.clone()))? {
            Answer::Done(done) => Ok(done),
            other => bail!("{}: {other:?}", self.contender.name()),
        }
    }

    pub fn flush(&mut self) -> Result<()> {
        self.ask(&protocol::Command::Flush).map(drop)
    }

    pub fn extra(&mut self, extra: Extra) -> Result<Value> {
        match self.ask(&protocol::Command::Extra(extra))? {
            Answer::Value(value) => Ok(value),
            _ => Ok(Value::Null),
        }
    }

    pub fn memory(&mut self) -> Result<Memory> {
        match self.ask(&protocol::Command::Memory)? {
            Answer::Memory(memory) => Ok(memory),
            other => bail!("{}: {other:?}", self.contender.name()),
        }
    }

    pub fn close(mut self) -> Result<()> {
        self.ask(&protocol::Command::Close)?;
        drop(self.input.take());
        let status = self.child.wait()?;
        if !status.success() {
            bail!("{} ended with {status}", self.contender.name());
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Contenders that take turns on images of their own.
pub struct Field {
    processes: Vec<(Contender, Process)>,
    /// Its image, and whether it bypasses the page cache.
    qemu: Option<(PathBuf, bool)>,
    /// Units of its disk that QEMU has been at.
    seen_by_qemu: u64,
}

/// What each contender's rounds took; a round that one of them was left out of is `None` there.
pub type Samples = BTreeMap<Contender, Vec<Option<Done>>>;

/// Adds the rounds of other files, of which all or none of the contenders had any.
pub fn add(samples: &mut Samples, more: Samples) {
    let rounds = |samples: &Samples| samples.values().map(Vec::len).max().unwrap_or(0);
    let (before, after) = (rounds(samples), rounds(samples) + rounds(&more));
    for (who, done) in more {
        let all = samples.entry(who).or_default();
        all.resize_with(before, || None);
        all.extend(done);
    }
    samples.values_mut().for_each(|all| all.resize_with(after, || None));
}

impl Field {
    /// Those that cannot open their image are left out, with a word on standard error.
    pub fn open(contenders: &[Contender], mut opening: impl FnMut(Contender) -> Result<Opening>) -> Result<Self> {
        let mut field = Self { processes: Vec::new(), qemu: None, seen_by_qemu: 0 };
        for &contender in contenders {
            let opening = opening(contender)?;
            if contender == Qemu {
                field.qemu = Some((opening.path.into(), opening.direct));
                continue;
            }
            match Process::open(contender, &opening) {
                Ok(process) => field.processes.push((contender, process)),
                Err(error) if contender.optional() => {
                    if contender.built() {
                        eprintln!("  left out: {error:#}");
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(field)
    }

    pub fn process(&mut self, contender: Contender) -> Result<&mut Process> {
        let found = self.processes.iter_mut().find(|(who, _)| *who == contender);
        found.map(|(_, process)| process).context("this contender does not take part")
    }

    /// `count` rounds; in each all contenders do `work(round)`, and then, off the clock, flush if it `changes` metadata.
    /// Who begins moves on by one each round. QEMU, which must be started anew each time, joins a few rounds only.
    pub fn rounds(&mut self, count: u64, changes: bool, mut work: impl FnMut(u64) -> Work) -> Result<Samples> {
        let mut samples = Samples::new();
        for round in 0..count {
            let work = work(round);
            let first = round as usize % self.processes.len().max(1);
            for turn in 0..self.processes.len() {
                let turn = (first + turn) % self.processes.len();
                let (contender, process) = &mut self.processes[turn];
                let done =
                    process.run(&work).and_then(|done| if changes { process.flush().map(|()| done) } else { Ok(done) });
                match done {
                    Ok(done) => samples.entry(*contender).or_default().push(Some(done)),
                    Err(error) if !contender.optional() => return Err(error),
                    Err(error) => {
                        eprintln!("  left out from round {round} on: {error:#}");
                        self.processes.remove(turn);
                        break;
                    }
                }
            }
            if let Some((image, direct)) = &self.qemu {
                let joins = round % count.div_ceil(3) == 0 && work.kind != Kind::Discard;
                let done = if joins { qemu::bench(image, *direct, &work, &mut self.seen_by_qemu)? } else { None };
                samples.entry(Qemu).or_default().push(done);
            }
        }
        Ok(samples)
    }

    /// The most memory that each has had resident, in bytes.
    pub fn peaks(&mut self) -> Result<Vec<(Contender, u64)>> {
        self.processes.iter_mut().map(|(who, process)| Ok((*who, process.memory()?.peak))).collect()
    }

    pub fn close(self) -> Result<()> {
        for (contender, process) in self.processes {
            match process.close() {
                Err(error) if contender.optional() => eprintln!("  at closing: {error:#}"),
                result => result?,
            }
        }
        Ok(())
    }
}
