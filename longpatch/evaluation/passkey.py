ANSWER_PREFIX = "\nWhat is the pass key? The pass key is"


def passkey_line(key):
    return f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
