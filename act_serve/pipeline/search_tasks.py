"""What a search scores at every p."""

from act_serve.profile.schema import Profile, Task


def search_tasks(profile: Profile) -> list[Task]:
    """Every score task by its own metric and by NLL, names all different."""
    tasks: dict[str, Task] = {task.name: task for task in profile.score}
    by_nll = {task.data.model_dump_json() for task in profile.score if task.metric == "nll"}
    for task in profile.score:
        if task.data.model_dump_json() not in by_nll and task.metric != "perplexity":
            by_nll.add(task.data.model_dump_json())
            name = f"{task.name}-nll"
            tasks[name] = task.model_copy(update={"name": name, "metric": "nll"})
    return list(tasks.values())
