"""The process that renders chat templates. `jinja.Sandbox` starts this file as a script and talks JSON lines with it.

A template is a stranger's program. Jinja's sandbox keeps it from Python's insides, but not from filling the memory or
running for ever; so it runs where both can be taken away. Nothing of jaxalign is imported here.
"""

import json
import sys


def main() -> None:
    import datetime
    import signal

    _limits()
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant writes. The marks around it are taken out later."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked", []), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return f"{marks[0]}{caller()}{marks[1]}"

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form):
        return (datetime.datetime.fromisoformat(today) if today else datetime.datetime.now()).strftime(form)

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    for draws in (env.filters, env.globals):  # what would give the same rows other texts every time
        draws.pop("random", None)
        draws.pop("lipsum", None)

    compiled: dict[str, jinja2.Template] = {}
    for line in sys.stdin:
        job = json.loads(line)
        marks, today, limit = job["marks"], job["today"], job["max_chars"]
        if hasattr(signal, "setitimer"):  # also when the other side was killed and no one is left to kill this one
            signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 1)
        out = []
        try:
            source = job["source"]
            if source not in compiled:
                compiled.clear()
                compiled[source] = env.from_string(source)
            for variables in job["jobs"]:
                out.append(_rendered(compiled[source], {**job["common"], **variables}, limit))
        except MemoryError:
            out = {"error": "it needs more memory than a template may have"}
        except RecursionError:
            out = {"error": "it nests without end"}
        except jinja2.exceptions.TemplateSyntaxError as e:
            out = {"error": f"line {e.lineno}: {type(e).__name__}: {e.message}"}
        except Exception as e:
            out = {"error": f"{type(e).__name__}: {str(e)[:500]}"}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(out) + "\n")
        sys.stdout.flush()


def _rendered(template, variables, limit) -> str:
    parts, length = [], 0
    for part in template.generate(**variables):
        length += len(part)
        if length > limit:
            raise ValueError(f"it writes more than {limit} characters")
        parts.append(part)
    return "".join(parts)


def _limits() -> None:
    """Half a gigabyte, no new files; where the system knows such limits."""
    try:
        import resource
    except ImportError:
        return
    for name, most in (("RLIMIT_AS", 512 << 20), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (AttributeError, ValueError, OSError):
            continue


if __name__ == "__main__":
    main()
