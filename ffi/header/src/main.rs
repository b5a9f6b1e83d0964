//! Writes `include/qcowrecycle.h` from the sources of the C interface, or with `--check` compares it.
//!
//! cbindgen orders a header by kind of item. A manual is ordered by subject, so each module of the interface is
//! rendered on its own, under its own introduction, and this puts them together.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

/// The modules of the interface in the order of the manual.
const SECTIONS: [&str; 14] = [
    "version",
    "error",
    "options",
    "callbacks",
    "create",
    "image",
    "data",
    "queue",
    "submit",
    "recycle",
    "inspect",
    "bitmaps",
    "snapshots",
    "offline",
];

const INTRODUCTION: &str = include_str!("introduction.h");
const CLOSING: &str = "\n#ifdef __cplusplus\n}\n#endif\n\n#endif /* QCOWRECYCLE_H */\n";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = root.join("include/qcowrecycle.h");
    let header = header(&root.join("ffi/src"))?;
    match std::env::args().nth(1).as_deref() {
        None => fs::write(&target, header)?,
        Some("--check") if fs::read_to_string(&target).unwrap_or_default() == header => {}
        Some("--check") => {
            eprintln!("include/qcowrecycle.h is not what its sources say: run `make header`");
            return Ok(ExitCode::FAILURE);
        }
        Some(other) => return Err(format!("unknown argument {other}").into()),
    }
    Ok(ExitCode::SUCCESS)
}

fn header(sources: &Path) -> Result<String, Box<dyn Error>> {
    let mut modules = Vec::new();
    for name in SECTIONS {
        let path = sources.join(name).with_extension("rs");
        let source = fs::read_to_string(&path)?;
        modules.push((path, source));
    }
    let all: BTreeSet<&str> = modules.iter().flat_map(|(_, source)| structs(source)).collect();
    let mut header = INTRODUCTION.to_owned();
    for (path, source) in &modules {
        let own: BTreeSet<&str> = structs(source).collect();
        let mut config = cbindgen::Config {
            language: cbindgen::Language::C,
            style: cbindgen::Style::Tag,
            documentation_style: cbindgen::DocumentationStyle::C,
            no_includes: true,
            usize_is_size_t: true,
            tab_width: 4,
            ..cbindgen::Config::default()
        };
        config.function.args = cbindgen::Layout::Horizontal;
        config.function.sort_by = Some(cbindgen::SortKey::None);
        config.constant.sort_by = Some(cbindgen::SortKey::None);
        config.export.include = own.iter().map(|name| (*name).to_owned()).collect();
        // What another section defines is unknown to cbindgen here, so it has to be told that it is a struct.
        let others = all.difference(&own).map(|name| (*name, format!("struct {name}")));
        let system = [("iovec", "struct iovec".to_owned())];
        config.export.rename = others.chain(system).map(|(name, c)| (name.to_owned(), c)).collect();

        let mut section = Vec::new();
        cbindgen::Builder::new().with_config(config).with_src(path).generate()?.write(&mut section);
        write!(header, "\n\n{}\n\n{}", introduction(source), tidy(&String::from_utf8(section)?))?;
    }
    header.push('\n');
    header.push_str(CLOSING);
    Ok(header)
}

/// cbindgen's comments in the form of hand-written ones.
fn tidy(section: &str) -> String {
    let mut out = String::new();
    let mut lines = section.trim().lines();
    while let Some(line) = lines.next() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if line.trim() != "/*" {
            out.push_str(&wrapped(line));
            out.push('\n');
            continue;
        }
        let text: Vec<&str> = lines.by_ref().map(str::trim).take_while(|line| *line != "*/").collect();
        let comment = text.join(&format!("\n{indent} * "));
        let closing = if text.len() == 1 { " */\n" } else { &format!("\n{indent} */\n") };
        out.extend([indent, "/* ", &comment, closing]);
    }
    out.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A declaration, its arguments under one another where they need more than one line.
fn wrapped(line: &str) -> String {
    const WIDTH: usize = 110;
    // Of a member that is a function, the name is in parentheses, too.
    let start = if line.starts_with(' ') { line.find(")(").map(|end| end + 1) } else { line.find('(') };
    let Some(column) = start.filter(|_| line.len() > WIDTH) else { return line.to_owned() };
    let (mut out, mut length) = (String::new(), 0);
    for argument in line.split_inclusive(", ") {
        if length + argument.trim_end().len() > WIDTH {
            out.push_str(&format!("\n{:column$} ", ""));
            length = column + 1;
        }
        out.push_str(argument);
        length += argument.len();
    }
    out
}

/// The names of the structs that a module defines for C, opaque ones too.
fn structs(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| {
        let name = line.strip_prefix("pub struct ")?.split([' ', ';', '{']).next()?;
        name.starts_with("qcr_").then_some(name)
    })
}

/// A module's own comment as the comment that opens its section.
fn introduction(source: &str) -> String {
    let rule = "=".repeat(110);
    let mut comment = format!("/* {rule}\n");
    for line in source.lines().map_while(|line| line.strip_prefix("//!")) {
        comment.push_str(format!(" *{line}").trim_end());
        comment.push('\n');
    }
    comment + " */"
}
